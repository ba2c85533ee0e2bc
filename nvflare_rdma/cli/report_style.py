"""The style sheet of a report's page.

The colours are Okabe and Ito's, which colour-blind people tell apart; what is not direct is hatched besides.
"""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --card: #f5f7f9; --line: #dde2e8; --text: #1b232d; --soft: #5a6675;
  --direct: #0072b2; --raw: #b9d6e8; --flare: #e69f00; --failed: #d55e00; --mark: #3b2a00; --shade: #eef1f5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14181d; --card: #1c2229; --line: #323b46; --text: #e3e7ec; --soft: #9aa6b4;
    --direct: #56b4e9; --raw: #2b4a5e; --flare: #e69f00; --failed: #f2783c; --mark: #201600; --shade: #1c232b;
  }
}
@page { margin: 14mm 12mm; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 80rem; padding: 1.5rem 1.25rem 3rem; background: var(--ground); color: var(--text);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header p, footer, .soft { color: var(--soft); }
header p { margin: 0; font-size: .87rem; overflow-wrap: anywhere; }
h1 { font-size: 1.45rem; line-height: 1.3; font-weight: 600; margin: .35rem 0 .6rem; max-width: 58rem; }
h2 { font-size: 1.05rem; font-weight: 600; margin: 2rem 0 .5rem; }
h3 { font-size: .92rem; font-weight: 600; margin: 1rem 0 .15rem; }
h3 span { font-weight: 400; color: var(--soft); }
p { margin: .4rem 0; max-width: 62rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.4rem, 1fr)); gap: .6rem; margin: 1.1rem 0 0; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .5rem .7rem; }
dt { font-size: .78rem; color: var(--soft); }
dd { margin: 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums; }
dd small { display: block; overflow-wrap: anywhere; font-size: .78rem; font-weight: 400; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .28rem .7rem .28rem 0; white-space: nowrap; vertical-align: baseline; }
thead th { white-space: normal; vertical-align: bottom; font-weight: 500; color: var(--soft); }
thead th { border-bottom: 1px solid var(--line); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody th { font-weight: 600; background: var(--ground); }
.left { text-align: left; }
.why { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 16rem; width: 65%; }
.name { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 6.2rem; max-width: 16rem; }
.bar { min-width: 4rem; width: 14%; }
svg { display: block; overflow: visible; }
.hidden { position: absolute; }
.raw { fill: var(--raw); }
.wire, .direct { fill: var(--direct); }
.flare { fill: url(#flare); }
.failed { fill: url(#failed); }
rect.flare { stroke: var(--flare); }
rect.failed { stroke: var(--failed); }
.ground-flare { fill: var(--flare); }
.ground-failed { fill: var(--failed); }
.stripe, .cross { stroke: var(--mark); stroke-width: 1.6; fill: none; }
.bad { color: var(--failed); font-weight: 600; }
.timeline { margin-top: .2rem; }
.timeline text, .chart text { font-size: 11px; fill: var(--soft); }
.round-0 { fill: var(--shade); }
.round-1 { fill: var(--line); fill-opacity: .55; }
.tick { stroke: var(--line); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .82rem; color: var(--soft); }
.key { display: inline-flex; align-items: center; gap: .4rem; }
.chart { max-width: 34rem; border-bottom: 1px solid var(--line); border-left: 1px solid var(--line); }
line.loss { stroke: var(--direct); stroke-width: 2; }
circle.loss { fill: var(--direct); }
header .note, .note { margin-top: .8rem; border-left: 3px solid var(--flare); padding-left: .7rem; }
footer { margin-top: 2.5rem; padding-top: .7rem; border-top: 1px solid var(--line); font-size: .82rem; }
@media (max-width: 40rem) {
  body { padding: 1rem .8rem 2rem; }
  h1 { font-size: 1.15rem; }
  tbody th { position: sticky; left: 0; }
  .why { min-width: 11rem; }
}
@media print {
  :root {
    color-scheme: light;
    --ground: #ffffff; --card: #ffffff; --line: #c9cfd6; --text: #000000; --soft: #444c56;
    --direct: #0072b2; --raw: #b9d6e8; --flare: #e69f00; --failed: #d55e00; --mark: #3b2a00; --shade: #eef1f5;
  }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  h2, h3, h2 + p, .legend { break-after: avoid; }
  thead { display: table-header-group; }
  tr, figure, dl div, .note { break-inside: avoid; }
  .scroll { overflow: visible; }
  th, td { padding-right: .45rem; }
}
figure { margin: 0; }
"""
