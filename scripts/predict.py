"""Classifies image files with an exported student; torch is not imported for an ONNX file.

python scripts/predict.py runs/digits/<stamp>/export/student.onnx image.png
"""

from litdistill.cli import run

if __name__ == "__main__":
    run("predict")
