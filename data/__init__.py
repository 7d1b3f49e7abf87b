"""Texts and tables that ship with pscope; `README.md` beside this file says where their facts come from."""
