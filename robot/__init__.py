"""A trained policy at work.

This folder, one model file and a checkpoint are all that a robot's computer needs. The folder may be copied
under any name: its imports are relative, and the model file is looked for beside it.
"""
from .errors import UserError
from .policy import Policy
from .realtime import InThread, RealTime

__all__ = ["InThread", "Policy", "RealTime", "UserError"]
