"""Operations on DTensors, as functions of PlacedArrays: elementwise, matmul, reductions, shapes."""
