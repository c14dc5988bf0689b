"""`python -P -m worker`: settings, logs, supervise."""

from __future__ import annotations

import argparse
import sys

from pydantic import ValidationError

from service.contract.logs import configure
from service.contract.settings import Settings
from worker.supervisor import Supervisor


def main() -> int:
    """Run a worker until a signal stops it; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -P -m worker", description="Work on jobs and serve models.")
    parser.add_argument("--lanes", help="of train, bulk, serve; default: ISTHMUS_LANES, or all of them")
    options = parser.parse_args()
    configure()
    try:
        settings = Settings()
        if options.lanes is not None:
            settings = settings.model_copy(update={"lanes": options.lanes})
        supervisor = Supervisor(settings)
    except (ValidationError, ValueError, PermissionError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
