"""How the page of `megamm report` looks, and the script that reads values off its curves."""

STYLE = """
:root { --width: 1240px; --main: #2563b8; --second: #c2410c; --good: #d5f0dd; --good-ink: #10602f;
 --blue: #dfeafb; --blue-ink: #124a8f; --warn-ink: #8a4b00 }
@media screen and (prefers-color-scheme: dark) {
:root { --main: #7db0f0; --second: #fb923c; --good: #1d4a2d; --good-ink: #a5ebbf; --blue: #1f3b60;
 --blue-ink: #bcd9ff; --warn-ink: #fbbf5a } }
.top { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: baseline }
.state { padding: .1rem .7rem; border-radius: 99px; font-size: .88rem; font-weight: 600;
 background: var(--blue); color: var(--blue-ink) }
.done { background: var(--good); color: var(--good-ink) }
.broken { background: var(--bad); color: var(--bad-ink) }
.bar { height: 6px; border-radius: 3px; background: var(--line); overflow: hidden }
.bar i { display: block; height: 100%; background: var(--main) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(205px, 1fr)); gap: 12px;
 margin: 16px 0 }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 9px 13px }
.tiles span, .tiles small { display: block; color: var(--soft); font-size: .8rem; line-height: 1.35 }
.tiles b { font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0 0 16px;
 padding: 13px 17px 15px; min-width: 0 }
.card > p { margin: .4rem 0 }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 350px), 1fr)); gap: 16px;
 margin-bottom: 16px }
.charts .card { margin: 0 } .wide { grid-column: 1 / -1 }
h2 small { color: var(--soft); font-weight: 400; font-size: .85rem }
.chart:focus-visible { outline: 3px solid var(--link); outline-offset: 1px }
.chart .read { color: var(--soft); font-size: .82rem; line-height: 1.35; margin: .15rem 0 .5rem;
 min-height: 2.7em; font-variant-numeric: tabular-nums }
.wide .read { min-height: 1.35em }
.chart .read.on { color: var(--ink) }
.keys { display: flex; gap: .2rem .9rem; flex-wrap: wrap; font-size: .8rem; color: var(--soft) }
.key::before { content: ""; display: inline-block; width: 1.1em; height: 3px; margin-right: .4em;
 vertical-align: middle; background: var(--main); border-radius: 2px }
.key.raw::before { height: 9px; opacity: .3 } .key.second::before { background: var(--second) }
.plot { display: grid; grid-template-columns: 3.1rem 1fr; grid-template-rows: 190px 1.4rem }
.wide .plot { grid-template-rows: 270px 1.4rem }
.y, .x { position: relative; font-size: .75rem; color: var(--soft); font-variant-numeric: tabular-nums }
.y span { position: absolute; right: .5rem; transform: translateY(50%); line-height: 1; white-space: nowrap }
.x { grid-column: 2 } .x span { position: absolute; top: .25rem; transform: translateX(-50%); line-height: 1 }
.x .end { transform: translateX(-100%) } .x .start { transform: none }
.area { position: relative; border-left: 1px solid var(--soft); border-bottom: 1px solid var(--soft);
 touch-action: pan-y }
.area svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: hidden }
.area i { position: absolute; top: 0; bottom: 0; width: 0; border-left: 1px solid var(--ink); display: none;
 pointer-events: none }
svg path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke-linecap: round }
svg .grid { stroke: var(--line); stroke-width: 1 }
svg .again { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 4 }
svg .raw { stroke: var(--main); stroke-width: 1; opacity: .55 }
svg .band { fill: var(--main); opacity: .24 }
svg .main { stroke: var(--main); stroke-width: 1.8 }
svg .second { stroke: var(--second); stroke-width: 1.5 } svg .dots { stroke: var(--second); stroke-width: 6 }
svg .lost { stroke: var(--bad-ink); stroke-width: 2.5 }
.scroll { overflow: auto; max-height: 420px }
table { border-collapse: collapse; font-size: .86rem; margin: .5rem 0 }
th, td { text-align: left; vertical-align: top; padding: .28rem 1.1rem .28rem 0; overflow-wrap: anywhere }
thead th { color: var(--soft); font-weight: 500; white-space: nowrap; border-bottom: 1px solid var(--line) }
tbody tr + tr td { border-top: 1px solid var(--line) }
.scroll td { font-variant-numeric: tabular-nums; min-width: 3.5rem; overflow-wrap: break-word }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr));
 align-items: start; gap: 16px; margin: 0 0 16px }
.panel { margin: 0; display: flex; flex-wrap: wrap; gap: 14px }
.panel > div:last-child { flex: 1 1 230px; min-width: 0 }
.pictures { display: flex; flex-wrap: wrap; gap: 8px; align-content: flex-start; max-width: 100% }
.pictures img { display: block; max-width: 160px; max-height: 160px; border-radius: 5px;
 border: 1px solid var(--line) }
.question { font-weight: 600; margin: 0 0 .3rem; overflow-wrap: anywhere }
.answers { margin: 0; width: 100% } .answers td { width: 100% }
.answers th { color: var(--soft); font-weight: 400; white-space: nowrap }
.truth td, .truth th { color: var(--good-ink) }
.events { list-style: none; margin: .5rem 0 0; padding: 0; max-height: 420px; overflow-y: auto;
 font-size: .84rem }
.events li { overflow-wrap: anywhere; padding: .1rem 0 }
.events time { color: var(--soft); font-variant-numeric: tabular-nums; margin-right: .5rem }
.warning { color: var(--warn-ink); font-weight: 600 }
pre { font: 12.5px/1.5 ui-monospace, "Cascadia Mono", Menlo, "DejaVu Sans Mono", monospace; overflow-x: auto;
 margin: .6rem 0 0 }
header dl { margin-bottom: 18px }
h2.of { margin: 22px 0 10px }
@media (max-width: 560px) { main, header { padding: 0 12px } dl { grid-template-columns: 1fr }
 dd { margin: 0 0 .4rem } .tiles { grid-template-columns: 1fr 1fr }
 .wide .plot { grid-template-rows: 210px 1.4rem } .chart .read { min-height: 4.05em } }
@media print { body { background: #fff; font-size: 11px } .card, .tiles div { break-inside: avoid }
 .charts { grid-template-columns: 1fr 1fr } .events, .scroll { max-height: none }
 * { print-color-adjust: exact; -webkit-print-color-adjust: exact } }
"""

# Points at the same steps in all charts at once; the page says everything but single values without it.
SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("numbers").textContent);
const cards = [...document.querySelectorAll(".chart")];
const rest = cards.map(card => card.querySelector(".read").textContent);
const nice = value => {
  if (value === null) return "no number";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e9)) return value.toExponential(2);
  return size >= 1e4 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));
};
const count = step => step.toLocaleString("en");
let at = -1;
function show(bucket) {
  at = bucket;
  cards.forEach((card, k) => {
    const read = card.querySelector(".read"), cross = card.querySelector(".area i");
    read.classList.toggle("on", bucket >= 0);
    if (bucket < 0) { read.textContent = rest[k]; cross.style.display = "none"; return; }
    const first = data.first[bucket], last = data.last[bucket], chart = data.charts[k];
    const words = [first === last ? "step " + count(last) : "steps " + count(first) + " to " + count(last)];
    for (const line of chart.lines) {
      let text = line.name + " " + nice(line.mean[bucket]) + chart.unit;
      if (first !== last && line.low && line.low[bucket] !== null)
        text += " (" + nice(line.low[bucket]) + " to " + nice(line.high[bucket]) + ")";
      words.push(text);
    }
    const seen = chart.dots.filter(dot => dot[0] <= last).pop();
    if (seen) words.push(chart.dotsName + " " + nice(seen[1]) + " at step " + count(seen[0]));
    read.textContent = words.join(" · ");
    cross.style.left = 100 * (last - data.left) / (data.right - data.left) + "%";
    cross.style.display = "block";
  });
}
function nearest(step) {
  let low = 0, high = data.last.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (data.last[middle] < step) low = middle + 1; else high = middle;
  }
  return low && step - data.last[low - 1] < data.last[low] - step ? low - 1 : low;
}
for (const card of cards) {
  const area = card.querySelector(".area");
  area.addEventListener("pointermove", event => {
    const box = area.getBoundingClientRect(), share = (event.clientX - box.left) / box.width;
    show(nearest(data.left + share * (data.right - data.left)));
  });
  area.addEventListener("pointerleave", () => show(-1));
  card.addEventListener("keydown", event => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key], end = data.last.length - 1;
    if (event.key === "Escape") show(-1);
    if (!move) return;
    event.preventDefault();
    show(Math.min(end, Math.max(0, (at < 0 ? end : at + move))));
  });
  card.addEventListener("blur", () => show(-1));
}
"""
