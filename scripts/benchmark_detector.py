"""Times the detectors of a run as ONNX files on one CPU thread, by turns: with and without post-processing, batch 1 and 8.

python scripts/benchmark_detector.py runs/detection/<run>
"""

import sys
from pathlib import Path

from litdistill.evaluation.evaluate import rebuild
from litdistill.export.latency import latency_table, onnx_of, time_files


def main(folder: str) -> None:
    data, distiller = rebuild(Path(folder))
    nets = {"student": distiller.deployed_student}
    if distiller.teacher is not None:
        nets["teacher"] = distiller.teacher.net
    files = {name: onnx_of(net, data, distiller.task) for name, net in nets.items()}
    reference = "teacher" if "teacher" in nets else "student"
    head, *rows = latency_table(time_files(files, next(iter(data.batches("test"))).inputs, reference), reference)
    print("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)))


if __name__ == "__main__":
    main(*sys.argv[1:])
