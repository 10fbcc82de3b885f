from triton_trio.testing.fixtures import serve as serve
