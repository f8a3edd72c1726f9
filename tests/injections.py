"""Text that somebody hostile, or just unlucky, may put into prompts, completions, column names and run names.

Whoever shows such text must show it as text: where one of these runs, `window.harmed` is 1.
"""

from __future__ import annotations

# Markup, script, style, template and address tricks.
TRICKS = (
    "<script>window.harmed=1</script>",
    "</script><script>window.harmed=1</script>",
    "</ScRiPt ><script>window.harmed=1</script>",
    "<!--<script>",
    "--><img src=x onerror=window.harmed=1>",
    "<svg onload=window.harmed=1><style>*{display:none}</style>",
    "<svg><desc><![CDATA[</desc><script>window.harmed=1</script>]]></svg>",
    "</textarea></title></style><iframe srcdoc='<script>parent.harmed=1</script>'>",
    "\"'><a href=javascript:window.harmed=1>x</a>",
    "' onmouseover='window.harmed=1' x='",
    '" onfocus="window.harmed=1" autofocus tabindex="1',
    "javascript:window.harmed=1//data:text/html,<script>",
    "{{script}}{{document}}${window.harmed=1}{{constructor.constructor('window.harmed=1')()}}",
    "{{csp}}{{name}}{% raw %}\\1\\g<0>",
    "]]>&lt;b&gt;&#60;b&#62;&amp;\\u003cb\\u003e",
    "<base href=//example.invalid><meta http-equiv=refresh content=0;url=//example.invalid>",
    "<form action=//example.invalid><input name=innerHTML id=run>",
    "<link rel=stylesheet href=//example.invalid/x.css><style>@import '//example.invalid/y.css'</style>",
    "\\u003cscript\\u003ewindow.harmed=1\\u003c/script\\u003e",
    "__proto__ constructor toString hasOwnProperty",
    "#prompts?sample=x&theme=dark %00 %ff ?&=;",
    "(.*)+[\\",
    "../../../etc/passwd",
)
# Text that a screen shows wrongly, or not at all.
UNSEEN = (
    "\u202egnp.exe\u202c \u2066x\u2069 \u200f\u061c",
    "nul\x00bell\x07escape\x1b[31mdelete\x7f\x85",
    "zero\u200bwidth\ufeff\u2028line\u2029paragraph",
    "Z\u0351\u036b\u0343\u036a\u0302\u036b" * 8,
    "W" * 3000,
    "مرحبا שלום 日本語 👩‍👩‍👧‍👦 ﷽",
    "line\r\nend\n\n\ttab",
)
HOSTILE = TRICKS + UNSEEN
