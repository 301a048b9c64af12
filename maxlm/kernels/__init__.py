"""Operations with a pure-JAX reference, fast paths per platform, and the choice between them."""
