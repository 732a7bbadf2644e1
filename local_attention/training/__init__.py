"""What a training run needs beside the model: step, schedules, evaluation, callbacks, checkpoints, run directory."""
