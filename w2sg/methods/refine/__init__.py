from w2sg.methods.refine.method import problems, refine

__all__ = ["problems", "refine"]
