"""What daemon and command line say over the control socket: a channel byte, a length (32 bits, big-endian), data."""

from __future__ import annotations

import struct

STDIN, STDOUT, STDERR, EXIT, ERROR, SIGNAL = range(6)
FRAME = struct.Struct(">BI")
FRAME_MAX = 1 << 16
