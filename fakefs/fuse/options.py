"""The mount options of tracefs: `uid=`, `gid=`, `mode=`, as in Linux's fs/tracefs; libfuse refuses them.

What they do is done by the guest, which mounts its own tracefs again with them. Flags that mount(8) adds by itself, or
finds at a FUSE mount (`rw`, `nosuid`, `user_id=0`...), are accepted and change nothing: the mount always has them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fakefs.errors import UserError

_WITHOUT_EFFECT = frozenset({
    "defaults", "auto", "noauto", "user", "nouser", "users", "nofail", "_netdev", "suid", "nosuid", "dev", "nodev",
    "exec", "noexec", "atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime",
    "lazytime", "nolazytime", "sync", "async", "remount", "allow_other", "default_permissions",
})  # fmt: skip
_ID_MAX = 0xFFFF_FFFE  # (uid_t)-1 means "leave as it is" to chown(2)


@dataclass(frozen=True, slots=True)
class MountOptions:
    """`None`: as the guest has it. `mode` holds the 12 permission bits."""

    uid: int | None = None
    gid: int | None = None
    mode: int | None = None
    ro: bool = False

    @classmethod
    def parse(cls, text: str) -> MountOptions:
        """Parse `text`, the argument of `-o`: "gid=1000,mode=755". The last of equals wins. Raises UserError (2)."""
        options = cls()
        for word in filter(None, (word.strip() for word in text.split(","))):
            name, equals, value = word.partition("=")
            if name == "uid" and equals:
                options = replace(options, uid=_number(word, value, 10, _ID_MAX))
            elif name == "gid" and equals:
                options = replace(options, gid=_number(word, value, 10, _ID_MAX))
            elif name == "mode" and equals:
                options = replace(options, mode=_number(word, value, 8, 0o7777))
            elif word in ("ro", "rw"):
                options = replace(options, ro=word == "ro")
            elif word not in _WITHOUT_EFFECT and name not in ("user_id", "group_id"):
                raise UserError(f"unknown mount option {word!r}; there are uid=, gid=, mode=, ro", exit_status=2)
        return options

    def __str__(self) -> str:
        return ",".join(filter(None, (self.for_guest(), "ro" if self.ro else "")))

    def for_guest(self) -> str:
        """What the guest's tracefs is to be mounted with: all but `ro`, which is the host's."""
        words = [f"{name}={value}" for name, value in (("uid", self.uid), ("gid", self.gid)) if value is not None]
        if self.mode is not None:
            words.append(f"mode={self.mode:o}")
        return ",".join(words)


def _number(word: str, value: str, base: int, largest: int) -> int:
    digits = "01234567" if base == 8 else "0123456789"
    if not 0 < len(value) <= 12 or value.strip(digits) or (number := int(value, base)) > largest:
        kind = "an octal mode" if base == 8 else "a number"
        raise UserError(
            f"mount option {word!r}: not {kind} (0 to {format(largest, 'o' if base == 8 else 'd')})", exit_status=2
        )
    return number
