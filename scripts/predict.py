"""Predicts with an exported student, for image files or rows of a .csv or .npy table; an ONNX file needs no torch.

python scripts/predict.py runs/digits/<stamp>/export/student.onnx image.png
python scripts/predict.py runs/tasks_regression/<stamp>/export/student.onnx patients.csv
"""

from litdistill.cli import run

if __name__ == "__main__":
    run("predict")
