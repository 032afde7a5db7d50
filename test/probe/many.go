package probe

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// serve answers on TCP and UDP from now on: it sends back what it gets, or, if
// Value is set, only swallows it.
func serve(_ *prober, c *Call) (Result, error) {
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	stream, err := config.Listen(context.Background(), "tcp", c.Address)
	if err != nil {
		return Result{}, err
	}
	datagram, err := config.ListenPacket(context.Background(), "udp", c.Address)
	if err != nil {
		return Result{}, errors.Join(err, stream.Close())
	}
	swallow := c.Value != 0
	go func() {
		for {
			conn, err := stream.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				if swallow {
					_, _ = io.Copy(io.Discard, conn)
				} else {
					_, _ = io.Copy(conn, conn)
				}
			}()
		}
	}()
	go func() {
		b := make([]byte, 64<<10)
		for {
			n, from, err := datagram.ReadFrom(b)
			if err != nil {
				return
			}
			if !swallow {
				_, _ = datagram.WriteTo(b[:n], from)
			}
		}
	}()
	return Result{}, nil
}

// flood sends the data Size times, to the address and those that follow it, one
// each, or all to the same if Value is set. It goes on behind refusals; N counts
// what the kernel took, and the error is the last refusal.
func flood(p *prober, c *Call) (r Result, err error) {
	fd, err := p.fd(c)
	if err != nil {
		return r, err
	}
	to, err := address(c, c.Address)
	if err != nil {
		return r, err
	}
	if len(to) != 16 {
		return r, errors.New("flood is for IPv4")
	}
	first := binary.BigEndian.Uint32(to[4:])
	for i := range c.Size {
		if c.Value == 0 {
			binary.BigEndian.PutUint32(to[4:], first+uint32(i))
		}
		_, _, errno := unix.Syscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(c.Data))),
			uintptr(len(c.Data)), 0, uintptr(unsafe.Pointer(unsafe.SliceData(to))), uintptr(len(to)))
		if errno == 0 {
			r.N++
		} else {
			err = errno
		}
	}
	runtime.KeepAlive(to)
	return r, err
}

// bindAll binds sockets of Type to every port from Value on, until Size are bound
// or the kernel refuses. N counts those that are; they stay until the probe ends.
func bindAll(_ *prober, c *Call) (r Result, err error) {
	for port := c.Value; port < 1<<16 && r.N < c.Size; port++ {
		fd, err := unix.Socket(unix.AF_INET, c.Type|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return r, err
		}
		if err := unix.Bind(fd, &unix.SockaddrInet4{Port: port}); err != nil {
			unix.Close(fd)
			return r, err
		}
		r.N++
	}
	return r, nil
}

// knock opens Size connections to the address and those that follow it, one each, and
// waits for none. N counts those that are on their way; they stay until the probe ends.
func knock(_ *prober, c *Call) (r Result, err error) {
	to, err := address(c, c.Address)
	if err != nil {
		return r, err
	}
	if len(to) != 16 {
		return r, errors.New("knock is for IPv4")
	}
	first := binary.BigEndian.Uint32(to[4:])
	for ; r.N < c.Size; r.N++ {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return r, err
		}
		binary.BigEndian.PutUint32(to[4:], first+uint32(r.N))
		if err := sockaddrCall(unix.SYS_CONNECT, fd, to); !errors.Is(err, unix.EINPROGRESS) {
			unix.Close(fd)
			return r, err
		}
	}
	return r, nil
}
