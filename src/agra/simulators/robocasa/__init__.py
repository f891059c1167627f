"""RoboCasa's GR1 tabletop tasks, in a Python environment of their own (`make env-robocasa`)."""
