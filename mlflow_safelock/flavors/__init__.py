"""MLflow flavors: ``meta_safetylock`` logs locks, ``locked_model`` logs and loads locked fine-tunes."""
