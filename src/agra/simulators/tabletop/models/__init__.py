"""The items, furniture and colours of the tabletop, as MuJoCo primitives."""
