"""Prints the table of `make faults`: each kind of fault, its trials, and how many runs survived them."""

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from faults.rows import ROWS, Size
from faults.scene import Scene
from faults.trials import Row, run_row, table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="faults", description="Injects every known fault into running trainings, and counts the survivors."
    )
    add = parser.add_argument
    add("--only", action="append", metavar="TEXT", help="only rows with this text in their name; repeatable")
    add("--skip", action="append", default=[], metavar="TEXT", help="not rows with this text; repeatable")
    add("--quick", action="store_true", help="about a tenth of the trials")
    add("--full", action="store_true", help="every crash point on every rank: hours")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="how many trials run at once")
    add("--list", action="store_true", help="print the names of the rows, and exit")
    add("--markdown", metavar="FILE", help="also write the table to this file")
    add("--json", metavar="FILE", help="also write the counts and the failures to this file")
    add("--keep", action="store_true", help="keep the files of failed trials")
    add("--folder", metavar="DIR", help="where the trials run (/dev/shm, if there is one)")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    wanted = [name for name in ROWS if any(text in name for text in args.only or [""])]
    wanted = [name for name in wanted if not any(text in name for text in args.skip)]
    if args.list or not wanted:
        print("\n".join(wanted or ROWS))
        return 0 if wanted else 2
    logging.disable()  # forge's warnings about a damaged checkpoint when a trial calls its selection here
    size = Size.QUICK if args.quick else Size.FULL if args.full else Size.USUAL

    folder = Path(
        tempfile.mkdtemp(prefix="faults-", dir=args.folder or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    )
    start = time.monotonic()
    rows: list[Row] = []
    try:
        scene = Scene(folder)
        for name in wanted:
            row_start = time.monotonic()
            try:
                row = Row(name, **ROWS[name](scene, size))
            except Exception as error:  # noqa: BLE001 - a row that cannot be set up has failed, and the others still run
                row = Row(name, [])
                row.failures.append(("setup", f"{type(error).__name__}: {error}"))
                report(f"  FAILED {name}: {error}")
            run_row(row, args.workers, report)
            row.seconds = time.monotonic() - row_start
            rows.append(row)
            report(table([row]).splitlines()[-1])
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    minutes = (time.monotonic() - start) / 60
    good = all(row.good for row in rows)
    text = f"{table(rows)}\n\n{sum(len(row.trials) for row in rows)} trials in {minutes:.1f} minutes: "
    text += "every run survived" if good else "NOT every run survived"
    print(f"\n{text}")
    if args.keep:
        print(f"trials that failed: {folder}")
    if args.markdown:
        Path(args.markdown).write_text(text + "\n")
    if args.json:
        values = [
            {
                **{"fault": row.fault, "trials": len(row.trials), "survived_percent": round(row.percent, 3)},
                **{"must_fail": row.must_fail, "seconds": round(row.seconds, 1), "failures": row.failures},
            }
            for row in rows
        ]
        Path(args.json).write_text(json.dumps({"rows": values, "good": good}, indent=2) + "\n")
    return 0 if good else 1


def report(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
