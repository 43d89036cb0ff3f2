"""The recordings of Part 4; importing this module registers their makers."""

from groundup.scaling import ladder, speedrun_ladder, tensorboard_screen

__all__ = ["ladder", "speedrun_ladder", "tensorboard_screen"]
