"""The words in which compiled code asks for a plan, and what it is answered: 64-bit integers, by their places.

Code that a user's functions keep is older or newer than the package that it finds. So a place never changes its
meaning; where one must, `VERSION` rises, and `nhwconv.njit.serve` refuses the older code in words.
"""

from __future__ import annotations

__all__ = ["ARRAYS", "FUNCTIONS", "KEY", "QUESTION", "REQUESTS", "VERSION"]

VERSION = 1

#: What compiled code may ask Python for: the state's address, an entry, to run one, and the number of a plan.
STATE, PLAN, PERFORM, NUMBER = REQUESTS = range(4)

#: The public functions by their numbers, and the call of a plan.
FUNCTIONS = (
    "conv2d", "conv2d_weight_grad", "conv2d_bias_grad", "conv2d_input_grad", "conv2d_backward",
    "conv_transpose2d", "conv_transpose2d_backward", "conv1d", "conv1d_backward",
    "conv_transpose1d", "conv_transpose1d_backward", "plan",
)  # fmt: skip

# ----------------------------------------------------------------------------------------- the question

FUNCTION = 0
#: The sum of those flags below that hold.
FLAGS = 1
ACCUMULATE, DX, DW, DB, OUT = (1 << i for i in range(5))
#: And, shifted, the place of the images' order of axes among `nhwconv.layouts.IMAGES`, and that of the weights' among
#: `nhwconv.layouts.WEIGHTS`, from 1 on, where one is given.
IMAGES_SHIFT, WEIGHTS_SHIFT = 8, 12
STRIDE = 2  #: rows, columns
PADDING = 4  #: top, bottom, left, right; of one dimension before, before, after, after
PADDING_TEXT = 8  #: the hash of a text, or 0
DILATION = 9
GROUPS = 11
SIZED = 12  #: whether the size of a kernel or of an input, or an output padding is given, and which
SIZE = 13  #: for the call of a plan, its number
STRATEGY = 15  #: the hash of a name, or of names joined by `SEPARATOR`, and as many
#: How many words from the first on are the key, together with what is said of arrays.
KEY = 16
#: The texts: address, characters, bytes of a character.
TEXT_OF_PADDING, TEXT_OF_STRATEGY = 16, 19
#: Addresses of what a program works on, in the order of `ARRAYS`, where they are C-contiguous and of one dtype.
OPERANDS = 22
SCRATCH = 30  #: the address of so many bytes as the entry says, and some more to align it
ANSWER = 31
HASH = 32
#: The arrays as the caller has them, by the names that the program has for them.
BLOCKS = 33
ARRAYS = ("x", "w", "b", "y", "dy", "dx", "dw", "db")
#: Of each: what it is, its shape, its strides in bytes, and its address.
CODE, SHAPE, STRIDES, DATA, BLOCK = 0, 1, 5, 9, 10
AXES = 4
#: The code is 0 where there is no array; otherwise this, and number of axes and size of an element shifted.
PRESENT, READ_ONLY, MISALIGNED = 1, 2, 4
AXES_SHIFT, ITEMSIZE_SHIFT = 4, 8
QUESTION = BLOCKS + len(ARRAYS) * BLOCK

SEPARATOR = "\n"

# -------------------------------------------------------------------------------------------- the entry

#: Bytes of scratch, or 0 where none is wanted; then four places for each result's shape: that of the only one, or those
#: of dx, dw and db.
NBYTES = 0
RESULTS = 1
ENTRY = RESULTS + 3 * AXES

# -------------------------------------------------------------------------------------------- the state

#: Addresses of functions, called with five words: ``find(question, state, 0, 0, 0)`` leaves in `ANSWER` an entry, or 0
#: where Python has to be asked; ``run(question, state, entry, 0, 0)`` leaves 1 where Python has to run it.
FIND, RUN = range(2)
