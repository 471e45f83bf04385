"""Training of what vestige learns: one loop and one way to read data for every trainer.

A trainer is a :class:`~vestige.training.task.Task`: parameters, and a loss for each sample. The loop does the rest::

    train_on, validate_on = split_documents(read_documents(["texts/", "more.jsonl"]))
    train(MyTask(train_on, validate_on), LoopConfig(steps=1000), Path("out"), resume=True)
"""
