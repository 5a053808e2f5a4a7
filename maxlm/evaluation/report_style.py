"""The look of a run's page, and the few lines of script that show values under the pointer."""

STYLE = """
:root {
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2330; --soft: #667085; --rule: #e4e7ec; --band: .16;
  --a: #2f6fde; --b: #e0732d; --c: #7a5af8; --d: #0e9384; --e: #2f6fde; --f: #c4559f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10141b; --card: #181e28; --ink: #e6eaf1; --soft: #98a2b3; --rule: #2a3240; --band: .25;
    --a: #6ea0ff; --b: #f79256; --c: #a48afb; --d: #3ccbb9; --e: #6ea0ff; --f: #e686c4;
  }
}
* { box-sizing: border-box; margin: 0; }
body {
  background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1020px; margin: 0 auto; padding: 40px 20px 64px; }
.brand { color: var(--soft); font-size: 13px; letter-spacing: .06em; text-transform: uppercase; }
h1 { font-size: 32px; line-height: 1.2; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { font-size: 15px; font-weight: 600; }
small { color: var(--soft); font-size: 13px; font-weight: 400; margin-left: 4px; }
.facts { color: var(--soft); margin-top: 6px; }
.facts i { font-style: normal; opacity: .6; margin: 0 4px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 10px; margin: 26px 0 18px; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 14px; }
.tile dt { color: var(--soft); font-size: 13px; white-space: nowrap; }
.tile dd { font-size: 22px; font-weight: 600; letter-spacing: -.01em; white-space: nowrap; }
.tile p { color: var(--soft); font-size: 12px; min-height: 18px; white-space: nowrap; }
.note { border-left: 3px solid var(--b); padding: 4px 12px; margin: 10px 0; color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 16px 18px 10px; }
.card, details { position: relative; margin-bottom: 14px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 0 14px; }
.legend { position: absolute; top: 16px; right: 18px; font-size: 13px; color: var(--soft); }
.key::before {
  content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin: 0 6px 3px 14px;
  background: var(--hue); vertical-align: middle;
}
#log-x { position: absolute; opacity: 0; }
label[for=log-x] {
  margin-left: 18px; padding: 3px 10px; border: 1px solid var(--rule); border-radius: 999px; cursor: pointer;
}
#log-x:checked ~ .legend label { background: var(--ink); color: var(--card); }
#log-x:focus-visible ~ .legend label { outline: 2px solid var(--a); }
.log, #log-x:checked ~ .linear { display: none; } #log-x:checked ~ .log { display: block; }
svg { display: block; width: 100%; height: auto; margin-top: 8px; overflow: visible; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .none { text-anchor: middle; font-size: 13px; }
.linear, .log { overflow-x: auto; } .wide svg { min-width: 620px; }
.grid { stroke: var(--rule); stroke-width: 1; } .axis { stroke: var(--soft); stroke-opacity: .5; }
.a { --hue: var(--a); } .b { --hue: var(--b); } .c { --hue: var(--c); }
.d { --hue: var(--d); } .e { --hue: var(--e); } .f { --hue: var(--f); }
.line { fill: none; stroke: var(--hue); stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
.dot { fill: var(--hue); stroke: var(--card); stroke-width: 1.5; }
.band { fill: var(--hue); fill-opacity: var(--band); }
.cursor { stroke: var(--soft); stroke-dasharray: 2 3; visibility: hidden; pointer-events: none; }
#tip {
  position: absolute; z-index: 2; pointer-events: none; visibility: hidden; background: var(--ink); color: var(--card);
  border-radius: 7px; padding: 5px 10px; font-size: 12.5px; white-space: nowrap; font-variant-numeric: tabular-nums;
}
#tip b { display: inline-block; min-width: 62px; font-weight: 400; opacity: .75; }
pre { font: 13px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-x: auto; }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; padding: 12px 0; }
.sample + .sample { border-top: 1px solid var(--rule); }
.sample b { color: var(--a); }
details { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 18px; }
summary { cursor: pointer; font-weight: 600; } details > :not(summary) { margin-top: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { color: var(--soft); font-weight: 400; text-align: left; white-space: nowrap; vertical-align: top; }
th, td { padding: 4px 16px 4px 0; }
td { overflow-wrap: anywhere; width: 100%; }
.numbers th, .numbers td { width: auto; text-align: right; font-variant-numeric: tabular-nums; }
tr + tr > * { border-top: 1px solid var(--rule); }
@media print { body { background: none; } details > * { display: block; } }
"""

SCRIPT = """
const tip = document.body.appendChild(Object.assign(document.createElement("div"), {id: "tip"}));
for (const svg of document.querySelectorAll("svg.chart")) {
  const series = JSON.parse(svg.querySelector(".data").textContent), cursor = svg.querySelector(".cursor");
  const all = series.flatMap(each => each.points.map(point => point[0]));
  const nearest = (xs, x) => xs.reduce((best, each) => Math.abs(each - x) < Math.abs(best - x) ? each : best, Infinity);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    const x = nearest(all, (event.clientX - box.left) / scale);
    tip.replaceChildren();
    let heading = "";
    for (const each of series) {
      const point = each.points.find(point => Math.abs(point[0] - x) < 0.75);
      if (!point) continue;
      heading = point[2];
      const row = tip.appendChild(document.createElement("div"));
      row.appendChild(document.createElement("b")).textContent = each.name;
      row.append(point[3]);
    }
    const first = document.createElement("div");
    first.appendChild(document.createElement("b")).textContent = "tokens";
    first.append(heading);
    tip.prepend(first);
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x);
    cursor.style.visibility = tip.style.visibility = "visible";
    const left = box.left + x * scale + 12, room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.min(left, room) + scrollX}px`;
    tip.style.top = `${event.clientY - tip.offsetHeight - 12 + scrollY}px`;
  });
  svg.addEventListener("pointerleave", () => { cursor.style.visibility = tip.style.visibility = "hidden"; });
}
"""
