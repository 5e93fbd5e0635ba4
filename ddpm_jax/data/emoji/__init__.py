"""Emoji in four styles with names: 3,953 concepts, 14,900 captioned images, read from npm packages.

The packages are fetched by the user (`missing_packages` names the commands); nothing of them is part of this library.
"""
