"""What the header of a coded file is made of: numbers, texts, and how they are read."""


def encode_number(value: int) -> bytes:
    r"""Writes a whole number, seven bits to a byte, the lowest first (LEB128).

    Args:
      value: 0 or more.

    Returns:
      Its bytes.

    Example:
      >>> encode_number(300)
      b'\xac\x02'
    """
    coded = bytearray()
    while value > 127:
        coded.append(value & 127 | 128)
        value >>= 7
    return bytes([*coded, value])


def encode_text(value: str) -> bytes:
    r"""Writes a text: how many bytes it has, and those, UTF-8.

    Args:
      value: any string without surrogates.

    Returns:
      Its bytes.

    Raises:
      ValueError: if it has surrogates.

    Example:
      >>> encode_text('σ0')
      b'\x03\xcf\x830'
    """
    coded = value.encode()
    return encode_number(len(coded)) + coded


class Reader:
    """Reads numbers, texts and bytes, one after the other.

    Args:
      data: what is to be read.

    Example:
      >>> reader = Reader(encode_number(300) + encode_text('fc1') + b'end')
      >>> reader.number(), reader.text(), reader.rest()
      (300, 'fc1', b'end')
    """

    def __init__(self, data: bytes):
        self._data = data
        self._at = 0

    def take(self, amount: int) -> bytes:
        """Reads bytes.

        Args:
          amount: how many.

        Returns:
          The bytes.

        Raises:
          ValueError: if there are fewer.
        """
        taken = self._data[self._at : self._at + amount]
        if len(taken) != amount:
            raise ValueError('it ends too early')
        self._at += amount
        return taken

    def number(self) -> int:
        """Reads a number.

        Returns:
          The number, below 2**63.

        Raises:
          ValueError: if it is larger or ends too early.
        """
        value = 0
        for shift in range(0, 63, 7):
            (byte,) = self.take(1)
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError('it has a number of 2**63 or more')

    def text(self) -> str:
        """Reads a text.

        Returns:
          The text.

        Raises:
          ValueError: if it ends too early or is not UTF-8.
        """
        return self.take(self.number()).decode()

    def rest(self) -> bytes:
        """Reads all that is left.

        Returns:
          The bytes, perhaps none.
        """
        return self.take(len(self._data) - self._at)
