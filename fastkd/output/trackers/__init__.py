"""Trackers: TensorBoard, Weights & Biases, MLflow and trackio are shown what a run folder holds."""
