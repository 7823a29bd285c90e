"""Print the oldest release of every base dependency that pyproject.toml admits, for pip.

`===` for whole version numbers: torch `2.13.0`, and not a `2.13.0+cpu` that lies about, which no
torchvision of the registry goes with.
"""

import re
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    dependencies = tomllib.load(file)["project"]["dependencies"]
for dependency in dependencies:
    name, floor = re.match(r"([\w-]+)>=([\d.]+)", dependency).groups()
    sys.stdout.write(f"{name}{'===' if floor.count('.') == 2 else '=='}{floor}\n")
