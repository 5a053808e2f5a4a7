"""The look of a plan's page: that of a run's page, with bars, verdicts and denser tables."""

from maxlm.evaluation.report_style import STYLE as RUN_STYLE

_LIGHT = """
  --good: #0b7a53; --bad: #b42318; --beyond: #b4231818;
  --compute: #2f6fde; --kernels: #86aef0; --hbm: #e0a02d; --ici: #0e9384; --dcn: #c4559f;
  --parameters: #7a5af8; --optimizer: #b5a4fb; --gradients: #c4559f; --activations: #2f6fde; --temporaries: #7fb2d9;
  --rest: #77818f; --maybe: #d3d8df; --inside: #ffffff;
"""

STYLE = (
    RUN_STYLE
    + f":root {{{_LIGHT}}}"
    + """
@media (prefers-color-scheme: dark) {
  :root {
    --good: #4cc38a; --bad: #ff8b7e; --beyond: #ff8b7e1c;
    --compute: #5b8ff0; --kernels: #34578f; --hbm: #e3ae4e; --ici: #2fb3a3; --dcn: #d976b6;
    --parameters: #8f77f5; --optimizer: #5a4a9e; --gradients: #d976b6; --activations: #5b8ff0; --temporaries: #3f6f94;
    --rest: #667085; --maybe: #343d4b; --inside: #ffffff;
  }
}
.tiles { grid-template-columns: repeat(auto-fit, minmax(168px, 1fr)); }
.tile { padding: 12px; } .tile dd { font-size: 18px; }
.verdict { font-size: 18px; font-weight: 600; margin-top: 14px; }
.verdict.good { color: var(--good); } .verdict.bad { color: var(--bad); }
.note.warning { border-color: var(--bad); color: var(--ink); }
.note.origin { border-color: var(--a); }
.card > p { color: var(--soft); font-size: 13.5px; margin: 8px 0; }
.keys { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--soft); margin-top: 6px; }
.keys span::before {
  content: ""; display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px;
  background: var(--fill); vertical-align: -1px;
}
.compute { --fill: var(--compute); } .kernels { --fill: var(--kernels); } .hbm { --fill: var(--hbm); }
.ici { --fill: var(--ici); } .dcn { --fill: var(--dcn); } .parameters { --fill: var(--parameters); }
.optimizer { --fill: var(--optimizer); } .gradients { --fill: var(--gradients); }
.activations { --fill: var(--activations); } .temporaries { --fill: var(--temporaries); } .rest { --fill: var(--rest); }
.maybe { --fill: var(--maybe); }
.bar { fill: var(--fill); stroke: var(--card); stroke-width: 1; }
.limit { stroke: var(--bad); stroke-width: 2; } .beyond { fill: var(--beyond); }
svg .over { fill: var(--bad); font-weight: 600; }
svg .name, svg .value { font-size: 12px; fill: var(--ink); }
svg .value { paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
svg .inside { fill: var(--inside); pointer-events: none; }
svg .inside.maybe { fill: var(--ink); }
.scroll { overflow-x: auto; margin-top: 10px; } .scroll svg { min-width: 640px; }
.figures { font-size: 13.5px; }
.figures th, .figures td { width: auto; padding: 3px 14px 3px 0; white-space: nowrap; vertical-align: baseline; }
.figures .r { text-align: right; font-variant-numeric: tabular-nums; }
.figures .l { text-align: left; } .figures .wraps { white-space: normal; overflow-wrap: anywhere; min-width: 180px; }
.figures tbody th { color: var(--ink); } .figures .total > * { font-weight: 600; }
.narrow { width: auto; min-width: min(520px, 100%); }
@media print {
  :root {
    --page: #ffffff; --card: #ffffff; --ink: #1c2330; --soft: #555e6d; --rule: #d5dae1; --a: #2f6fde; --b: #e0732d;
"""
    + _LIGHT
    + """
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  .card { break-inside: auto; } svg, tr, .tile { break-inside: avoid; } h2 { break-after: avoid; }
  .scroll { overflow: visible; } .figures { font-size: 10px; }
  .figures th, .figures td { white-space: normal; padding-right: 8px; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
)
