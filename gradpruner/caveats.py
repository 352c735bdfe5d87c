"""What must be said beside every number of a method, by the method's name.

Tables say it of older records, too, so it is not read from these.
"""

_SAT = (
    "SAT: no code of its authors exists, so schedule and formulas are ours. With a dense tail it ends level with "
    "dense here, in the paper 3 to 5 points below; sat_constant, without one, is the other end of the range"
)
CAVEATS = {"sat": _SAT, "sat_constant": _SAT}
