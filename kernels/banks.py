"""Banks: parts of a dictionary that one lookup can choose from, and how many codes a row should take of each.

The tier `avx512vbmi` holds a token's products with a bank of atoms in two registers, and picks four codes of a row from
it at once (FORMAT.md section 5). It takes any codes, but those that keep to the limit with fewer lookups.
"""

BANK_ATOMS = 128
QUAD = 4
# Places that the limit leaves beside the codes of a row: so many that coding hardly feels it.
_ROOM = 1.25


def bank_atoms(n_atoms: int) -> int:
    """Atoms of each bank but the last, which has what is left: the K of a block in as few even parts as will do."""
    n_banks = -(-n_atoms // BANK_ATOMS)
    return -(-n_atoms // n_banks)


def bank_sizes(n_atoms: int) -> list[int]:
    """Atoms of each bank."""
    size = bank_atoms(n_atoms)
    return [min(size, n_atoms - first) for first in range(0, n_atoms, size)]


def bank_limit(n_atoms: int, n_nonzero: int) -> int:
    """Most codes that a row should take of one bank: whole quads, as few as leave the coder some choice."""
    n_banks = -(-n_atoms // BANK_ATOMS)
    if n_banks == 1:
        return n_nonzero
    limit = QUAD
    while limit * n_banks < _ROOM * n_nonzero:
        limit += QUAD
    return min(limit, n_nonzero)
