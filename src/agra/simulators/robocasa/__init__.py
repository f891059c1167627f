"""RoboCasa's GR1 tabletop tasks; in their own environment, made by `make env-robocasa`."""
