"""Publish the recorded benchmarks as a dashboard, and serve it; nothing is measured.

asv's pages load their libraries from the web. Where npm is installed, they are fetched once and put beside the pages,
so that the dashboard needs no network afterwards; otherwise it is left as asv makes it.

    python tools/dashboard.py            # publish into .asv/html and serve
    python tools/dashboard.py --out DIR  # publish only
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: What asv's index.html loads, by the name of the file there: an npm package, its version, and the file within it.
LIBRARIES = {
    "jquery-3.3.1.min.js": ("jquery", "3.3.1", "dist/jquery.min.js"),
    "jquery.flot.min.js": ("flot", "0.8.3", "jquery.flot.js"),
    "jquery.flot.time.min.js": ("flot", "0.8.3", "jquery.flot.time.js"),
    "jquery.flot.selection.min.js": ("flot", "0.8.3", "jquery.flot.selection.js"),
    "jquery.flot.categories.min.js": ("flot", "0.8.3", "jquery.flot.categories.js"),
    "jquery.flot.orderBars.js": ("flot-orderbars", "1.0.0", "js/jquery.flot.orderBars.js"),
    "stupidtable.min.js": ("stupid-table-plugin", "1.1.3", "stupidtable.min.js"),
    "md5.min.js": ("blueimp-md5", "2.19.0", "js/md5.min.js"),
    "bootstrap.min.js": ("bootstrap", "3.1.1", "dist/js/bootstrap.min.js"),
    "bootstrap.min.css": ("bootstrap", "3.1.1", "dist/css/bootstrap.min.css"),
}

#: A tag that loads something from the web: what is before its address, the file's name, and the rest of the tag.
_TAG = re.compile(r'(<(?:script|link)\b[^>]*?(?:src|href)=")https://[^"]*/([^"/]+)"[^>]*>')


def publish(out: Path) -> None:
    """Write the dashboard of everything in benchmarks/results."""
    command = [sys.executable, "-m", "asv", "publish", "--config", str(ROOT / "asv.conf.json"), "--html-dir", str(out)]
    subprocess.run(command, check=True, cwd=ROOT)


def bring_libraries(out: Path, npm: str) -> None:
    """Put the libraries beside the pages, and have the pages load them from there."""
    modules = ROOT / ".asv" / "libraries"
    packages = sorted({f"{name}@{version}" for name, version, _ in LIBRARIES.values()})
    modules.mkdir(parents=True, exist_ok=True)
    options = ["--no-save", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    options += ["--fetch-retries=1", "--fetch-timeout=20000"]
    if subprocess.run([npm, "install", *options, "--prefix", str(modules), *packages], check=False).returncode:
        print("npm cannot fetch the pages' libraries, so the dashboard loads them from the web", file=sys.stderr)
        return
    for target, (name, _, file) in LIBRARIES.items():
        shutil.copy(modules / "node_modules" / name / file, out / target)
    index = out / "index.html"
    index.write_text(_TAG.sub(_beside, index.read_text(encoding="utf-8")), encoding="utf-8")


def _beside(tag: re.Match[str]) -> str:
    """Load a known library from beside the page; its checksum was that of another build."""
    if tag[2] not in LIBRARIES:
        raise SystemExit(f"asv's page loads {tag[2]}, which {Path(__file__).name} does not know")
    return f'{tag[1]}{tag[2]}"{" rel=stylesheet" if tag[2].endswith(".css") else ""}>'


def main() -> None:
    """Publish, and serve unless a folder was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="only publish, into this folder")
    out: Path | None = parser.parse_args().out
    target = (out or ROOT / ".asv" / "html").resolve()
    publish(target)
    if npm := shutil.which("npm"):
        bring_libraries(target, npm)
    if out is None:
        subprocess.run(
            [sys.executable, "-m", "asv", "preview", "--config", str(ROOT / "asv.conf.json")], check=True, cwd=ROOT
        )


if __name__ == "__main__":
    main()
