"""Writes the student of a finished run in a format to ship, checks it in its own runtime, and adds it to the manifest.

python scripts/export.py run=runs/digits/<stamp>                                 student.onnx, takes uint8 images
python scripts/export.py run=runs/digits/<stamp> precision=int8                  student-int8.onnx
python scripts/export.py run=runs/digits/<stamp> format=pt2 preprocessing=false  takes normalized floats
python scripts/export.py run=runs/digits/<stamp> verify=true                     checks again what was exported
python scripts/predict.py runs/digits/<stamp>/export/student.onnx image.png      uses it
"""

from litdistill.cli import run

if __name__ == "__main__":
    run("export")
