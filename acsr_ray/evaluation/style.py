"""The common style of the HTML pages: light, dark and on paper.

The accents are Okabe and Ito's, which the colour-blind tell apart, lighter in the dark. No state is told by
colour alone.
"""

_LIGHT = (
    "--ground:#fff;--raised:#f6f7f9;--text:#1b1f24;--quiet:#57606a;--line:#d5dae0;"
    "--accent:#0072b2;--second:#c05000;--good:#00714f;--warn-ground:#fdf1e9;--idle:#e9ecf0"
)
_DARK = (
    "--ground:#14171b;--raised:#1d2228;--text:#e7eaee;--quiet:#a3adb8;--line:#3a424c;"
    "--accent:#56b4e9;--second:#e69f00;--good:#33c79a;--warn-ground:#33271a;--idle:#2b323a"
)

_TEXT = (
    "*{box-sizing:border-box}"
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:90rem;padding:0 1rem;"
    "background:var(--ground);color:var(--text);overflow-wrap:break-word}"
    "h1{line-height:1.2;margin:0 0 .5rem;overflow-wrap:anywhere}h2{margin:2.5rem 0 .5rem;line-height:1.25}"
    "h3{margin:1.5rem 0 .25rem;font-size:1.05rem}p{max-width:48rem}.note{color:var(--quiet);font-size:.9em}"
    "code{font:.92em ui-monospace,monospace;overflow-wrap:anywhere;unicode-bidi:isolate}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "td,th{border:1px solid var(--line);padding:.3rem .7rem;text-align:right;vertical-align:top}"
    "th{background:var(--raised)}"
    "td:first-child,th:first-child,.words td,.words th,.meant :last-child{text-align:left}"
    ".words td{overflow-wrap:anywhere;min-width:11rem}"
    ".counts td,.counts th{white-space:nowrap}caption{text-align:left;padding:.3rem 0}"
    ".scroll{overflow-x:auto;margin:0 0 1rem}"
    ".warnings{border-left:4px solid var(--second);background:var(--warn-ground);padding:.3rem 1rem;"
    "margin:1rem 0}.warnings ul{padding-left:1.2rem;margin:.4rem 0;overflow-wrap:anywhere}"
    "summary{cursor:pointer;color:var(--accent)}summary:focus-visible{outline:2px solid var(--accent)}"
)
_FIGURES = (
    "img{max-width:100%}img.panel,img.pixels{image-rendering:pixelated}img.figure,img.panel{background:#fff}"
    "figure{margin:1rem 0}.charts{display:grid;gap:1rem 2rem;"
    "grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr))}"
    ".chart{margin:.5rem 0;max-width:38rem}.chart figcaption{font-weight:600}"
    ".chart svg{width:100%;height:auto}"
    ".chart p{margin:.2rem 0;color:var(--quiet);font-size:.9em}"
    "svg text{font:12px system-ui,sans-serif;fill:var(--text)}svg .quiet{fill:var(--quiet)}"
    "svg .end{text-anchor:end}svg .middle{text-anchor:middle}"
    "svg .axis{stroke:var(--quiet);stroke-width:1}svg .rule{stroke:var(--line);stroke-width:1}"
    "svg .bar{fill:var(--accent)}svg .area{fill:var(--accent);fill-opacity:.25}"
    "svg .curve{fill:none;stroke:var(--accent);stroke-width:2}svg .second{fill:var(--second)}"
    "svg .mean{stroke:var(--second);stroke-width:1.5;stroke-dasharray:5 3}"
    "svg .whisker{stroke:var(--accent);stroke-width:2}"
    "svg .unused{fill:none;stroke:var(--second);stroke-width:1.5;stroke-dasharray:3 2}"
)
_RUN = (
    ".badge{display:inline-block;border:2px solid;border-radius:.4rem;padding:.05rem .6rem;font-weight:600}"
    ".good{color:var(--good)}.bad{color:var(--second)}"
    "dl.facts{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:1rem 0}"
    ".facts dt{color:var(--quiet)}.facts dd{margin:0;overflow-wrap:anywhere}"
    ".tiles{display:grid;gap:.75rem;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));"
    "margin:1.25rem 0;padding:0;list-style:none}"
    ".tiles li{background:var(--raised);border:1px solid var(--line);border-radius:.5rem;padding:.6rem .8rem}"
    ".tiles b{display:block;font-size:1.45rem;line-height:1.25;font-variant-numeric:tabular-nums}"
    ".tiles span{color:var(--quiet);font-size:.9em}"
    ".examples{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,27rem),1fr))}"
    ".example{margin:0;padding:.6rem;background:var(--raised);border:1px solid var(--line);"
    "border-radius:.5rem}.three{display:flex;gap:.4rem;min-width:0}.three div{min-width:0}"
    ".three span{display:block;color:var(--quiet);font-size:.8em}"
    ".three img,.strip img{display:block;height:auto}"
    ".three .absent{width:9rem;max-width:100%;min-height:6rem;border:1px dashed var(--line);padding:.5rem;"
    "color:var(--quiet);font-size:.8em}"
    ".example{display:flex;flex-wrap:wrap;gap:.4rem .8rem;align-content:flex-start}"
    ".example figcaption{font-size:.88em;flex:1 1 9rem;overflow-wrap:anywhere}"
    ".montage{display:grid;gap:.75rem 1.5rem;margin:1rem 0;"
    "grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr))}"
    ".montage figure{margin:0}.montage figcaption{font-size:.9em}"
    ".strip{display:flex;gap:3px}.strip img{min-width:0;max-width:calc(16.6% - 3px)}"
)
_PAPER = (
    "@media(max-width:34rem){body{margin:1rem auto;padding:0 .75rem}"
    "dl.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:.4rem}"
    ".tiles{grid-template-columns:repeat(2,1fr)}}"
    "@media print{body{margin:0;max-width:none;font-size:11px}"
    "*{print-color-adjust:exact;-webkit-print-color-adjust:exact}"
    "h2,h3{break-after:avoid}figure,.tiles li,tr{break-inside:avoid}summary{display:none}"
    "details::details-content{content-visibility:visible;block-size:auto}"
    ".examples,.montage{grid-template-columns:repeat(3,1fr)}.charts{grid-template-columns:repeat(2,1fr)}}"
)

STYLE = (
    f":root{{color-scheme:light dark;{_LIGHT}}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    f"{_TEXT}{_FIGURES}{_RUN}{_PAPER}"
)
"""Of every page; no page needs all of it, and it is shorter than one small picture."""
