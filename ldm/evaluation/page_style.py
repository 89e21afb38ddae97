"""How a report looks: one style sheet, light and dark, on screen and on paper."""

STYLE = """
:root{color-scheme:light dark;--ink:#1c2330;--soft:#5d6778;--paper:#fff;--panel:#f5f7fa;--edge:#d9dfe7;--good:#1a7f4b;
--bad:#c2362b;--warn:#9a6700;--s0:#2563c9;--s1:#d9622b;--s2:#178a5f;--s3:#9c3fb0;--s4:#b5880e;--s5:#0f8ea0;--s6:#c43b6e;
--s7:#6b7280}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9f0;--soft:#98a3b3;--paper:#12161d;--panel:#1b212b;--edge:#323b49;
--good:#4cc38a;--bad:#ff8177;--warn:#e3b341;--s0:#6ea8ff;--s1:#ff9d6c;--s2:#4fd1a1;--s3:#d99cf0;--s4:#e8c35c;--s5:#5fd0e0;
--s6:#ff8fb8;--s7:#a3adba}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:28px 22px 60px;background:var(--paper);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:25px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:19px;margin:44px 0 10px;padding-top:12px;border-top:1px solid var(--edge)}
p{margin:8px 0;max-width:80ch;overflow-wrap:anywhere}
.sub,.note,caption,figcaption,footer{color:var(--soft)}
.note{font-size:13px}
ul.verdicts{list-style:none;margin:18px 0;padding:0;border:1px solid var(--edge);border-left:5px solid var(--s0);
border-radius:6px;background:var(--panel)}
ul.verdicts li{padding:9px 16px;border-top:1px solid var(--edge);overflow-wrap:anywhere}
ul.verdicts li:first-child{border-top:0}
ul.verdicts b{margin-right:6px}
nav{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;margin:10px 0}
nav a{color:var(--s0);text-decoration:none}
.missing{border:1px dashed var(--edge);border-radius:6px;padding:8px 14px;color:var(--soft);
font-size:14px;max-width:none}
.missing b{color:var(--warn)}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(var(--cell,124px),1fr));gap:12px;margin:12px 0}
figure{margin:0;min-width:0}
figure.shown{outline:none}
img{display:block;max-width:100%;border-radius:4px;background:var(--panel)}
.gallery img{width:100%;height:auto}
.wide img{max-width:100%;height:auto}
.pixels img,img.pixels{image-rendering:pixelated}
figure.shown:focus img{position:fixed;inset:0;margin:auto;width:auto;max-width:92vw;
height:min(92vh,92vw);object-fit:contain;z-index:9;border-radius:0;box-shadow:0 0 0 200vmax rgba(0,0,0,.7)}
figcaption{font-size:12px;line-height:1.35;margin-top:4px;overflow-wrap:anywhere}
.flag{color:var(--bad);font-weight:600}.ok{color:var(--good);font-weight:600}.unsure{color:var(--warn);font-weight:600}
.scroll{overflow-x:auto}
table{border-collapse:collapse;margin:12px 0;font-size:13px;font-variant-numeric:tabular-nums}
caption{text-align:left;padding-bottom:4px}
th,td{padding:5px 10px;border-bottom:1px solid var(--edge);text-align:left;vertical-align:top}
th{color:var(--soft);font-weight:600;white-space:nowrap}
td.number,th.number{text-align:right;white-space:nowrap}
td.tight{white-space:nowrap}
td.value{font-weight:600;font-size:14px}
td.small{color:var(--soft);font-size:12px;min-width:9em}
td.words{color:var(--soft);font-size:12px;width:100%}
tr.best td.value{color:var(--good)}
.plots{display:flex;flex-wrap:wrap;gap:18px;margin:12px 0;align-items:flex-start}
svg.plot{width:100%;flex:1 1 auto;height:auto;background:var(--panel);border:1px solid var(--edge);border-radius:6px}
svg text{fill:var(--ink);font:11px system-ui,sans-serif}
svg .title{font-size:13px;font-weight:600}
svg .tick{fill:var(--soft);font-size:11px}
svg .label{fill:var(--soft);font-size:12px}
svg .middle{text-anchor:middle}svg .end{text-anchor:end}
svg .grid{stroke:var(--edge);stroke-width:1}
svg .axis{stroke:var(--soft);stroke-width:1}
svg .line{fill:none;stroke-width:1.8;stroke-linejoin:round}
svg .band{stroke:none;fill-opacity:.18}
svg .whisker,svg .error{stroke-width:1.6}
svg .error{stroke:var(--ink)}
svg .cell{stroke:var(--edge)}
svg .cell.right{fill:var(--good)}svg .cell.wrong{fill:var(--bad)}
svg .line.s0,svg .whisker.s0{stroke:var(--s0)}svg .band.s0,svg .dot.s0,svg .bar.s0{fill:var(--s0)}
svg .line.s1,svg .whisker.s1{stroke:var(--s1)}svg .band.s1,svg .dot.s1{fill:var(--s1)}
svg .line.s2,svg .whisker.s2{stroke:var(--s2)}svg .band.s2,svg .dot.s2{fill:var(--s2)}
svg .line.s3,svg .whisker.s3{stroke:var(--s3)}svg .band.s3,svg .dot.s3{fill:var(--s3)}
svg .line.s4,svg .whisker.s4{stroke:var(--s4)}svg .band.s4,svg .dot.s4{fill:var(--s4)}
svg .line.s5,svg .whisker.s5{stroke:var(--s5)}svg .band.s5,svg .dot.s5{fill:var(--s5)}
svg .line.s6,svg .whisker.s6{stroke:var(--s6)}svg .band.s6,svg .dot.s6{fill:var(--s6)}
svg .line.s7,svg .whisker.s7{stroke:var(--s7)}svg .band.s7,svg .dot.s7{fill:var(--s7)}
footer{margin-top:50px;border-top:1px solid var(--edge);padding-top:10px;font-size:13px}
details{margin:10px 0}summary{cursor:pointer;color:var(--soft)}
@media print{:root{color-scheme:light;--ink:#000;--soft:#444;--paper:#fff;--panel:#fff;--edge:#bbb;--good:#1a7f4b;
--bad:#c2362b;--s0:#2563c9;--s1:#d9622b;--s2:#178a5f;--s3:#9c3fb0;--s4:#b5880e;--s5:#0f8ea0;--s6:#c43b6e;--s7:#6b7280}
body{max-width:none;padding:0;font-size:11px}nav{display:none}h2{break-after:avoid;margin-top:22px}
figure,svg.plot,tr,.verdicts{break-inside:avoid}.gallery{--cell:90px}.scroll{overflow:visible}table{font-size:9px}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
