"""Predicts with an exported student, for image files or the rows of a .csv or .npy table; torch is not imported for an ONNX file.

python scripts/predict.py runs/digits/<stamp>/export/student.onnx image.png
python scripts/predict.py runs/regression/<stamp>/export/student.onnx patients.csv
"""

from litdistill.cli import run

if __name__ == "__main__":
    run("predict")
