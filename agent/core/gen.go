package core

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -output-stem demarc -cflags "-O2 -g -mcpu=v3 -Wall -Werror" demarc ../../bpf/demarc.bpf.c -- -I../../bpf -I/usr/include/x86_64-linux-gnu
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -output-stem guard -cflags "-O2 -g -mcpu=v3 -Wall -Werror" guard ../../bpf/guard.bpf.c -- -I../../bpf -I/usr/include/x86_64-linux-gnu
