"""docs/plan.png, the plan page as a browser shows it: .venv/bin/python tests/plan_picture.py"""

import base64

import chromium
from baking import ROOT

PAGE = ROOT / "docs" / "plan" / "index.html"
QUERY = "instances=4&cpus=2&memory_mib=2048&jobs=worker%3D2x4"
SIZE = (1120, 720)


def main() -> None:
    with chromium.opened() as page:
        page.open(f"{PAGE.as_uri()}?{QUERY}", *SIZE)
        shot = page.tell("Page.captureScreenshot", format="png")
    (ROOT / "docs" / "plan.png").write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__":
    main()
