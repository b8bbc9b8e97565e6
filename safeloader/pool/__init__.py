"""The pool: who makes batches, who watches, and what happens when somebody dies. `ARCHITECTURE.md` draws it."""
