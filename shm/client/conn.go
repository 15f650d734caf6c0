package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"scoria/shm/mem"
	"scoria/shm/wire"
)

// ServerError is a refusal by the server.
type ServerError struct {
	Request wire.Type
	Code    wire.Code
	Message string
}

func (e *ServerError) Error() string { return fmt.Sprintf("%v: %s", e.Request, e.Message) }

// IsCode reports whether err is the server's refusal with the code.
func IsCode(err error, code wire.Code) bool {
	var e *ServerError
	return errors.As(err, &e) && e.Code == code
}

// conn is a connection after hello, for one request at a time.
type conn struct {
	sock   *net.UnixConn
	limits wire.HelloAnswer
	tag    uint32
	in     [wire.MaxMessage]byte
	event  func(wire.Volume) // of a change; may be nil
}

// dial connects and says hello.
func dial(ctx context.Context, socket string) (*conn, error) {
	d := net.Dialer{}
	c, err := d.DialContext(ctx, "unixpacket", socket)
	if err != nil {
		return nil, err
	}
	k := &conn{sock: c.(*net.UnixConn)}
	body, _, err := k.ask(ctx, wire.Hello, wire.HelloRequest{Min: wire.MinVersion, Max: wire.MaxVersion}.Append(nil), 0)
	if err == nil {
		k.limits, err = wire.DecodeHelloAnswer(body)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return k, nil
}

// ask sends a request and waits for its answer, whose descriptors, at most
// maxFDs, are the caller's. The body is good until the next call.
func (k *conn) ask(ctx context.Context, t wire.Type, body []byte, maxFDs int, fds ...int) ([]byte, []int, error) {
	stop := context.AfterFunc(ctx, func() { _ = k.sock.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	k.tag++
	if err := mem.WriteFull(k.sock, wire.Append(nil, wire.Header{Type: t, Tag: k.tag}, body), fds...); err != nil {
		return nil, nil, k.failed(ctx, t, err)
	}
	for {
		h, body, fds, err := k.read(maxFDs)
		if err != nil {
			return nil, nil, k.failed(ctx, t, err)
		}
		if h.Type&wire.Answer == 0 { // an event
			mem.CloseAll(fds)
			continue
		}
		switch {
		case h.Type != t|wire.Answer || h.Tag != k.tag:
			mem.CloseAll(fds)
			return nil, nil, fmt.Errorf("%v: got %v, tag %d", t, h.Type, h.Tag)
		case h.Status != wire.OK:
			mem.CloseAll(fds)
			return nil, nil, &ServerError{Request: t, Code: h.Status, Message: string(body)}
		}
		return body, fds, nil
	}
}

func (k *conn) failed(ctx context.Context, t wire.Type, err error) error {
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return fmt.Errorf("%v: %w", t, err)
}

// read reads one message; events are told.
func (k *conn) read(maxFDs int) (wire.Header, []byte, []int, error) {
	n, fds, err := mem.ReadPacket(k.sock, k.in[:], maxFDs)
	if err != nil {
		return wire.Header{}, nil, nil, err
	}
	h, body, err := wire.Parse(k.in[:n])
	if err == nil && h.Type == wire.Changed && k.event != nil {
		var v wire.Volume
		if v, err = wire.DecodeVolume(body); err == nil {
			k.event(v)
		}
	}
	if err != nil {
		mem.CloseAll(fds)
		return h, nil, nil, err
	}
	return h, body, fds, nil
}

// open opens a volume.
func (k *conn) open(ctx context.Context, volume string, readOnly bool) (wire.Volume, error) {
	n := wire.Named{Name: volume}
	if readOnly {
		n.Value = wire.OpenReadOnly
	}
	body, _, err := k.ask(ctx, wire.Open, n.Append(nil), 0)
	if err != nil {
		return wire.Volume{}, err
	}
	return wire.DecodeVolume(body)
}
