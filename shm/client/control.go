package client

import (
	"context"
	"sync"

	"scoria/shm/wire"
)

// Control asks a server about volumes and changes them. Its methods may be
// called from any goroutine; a context that ends in the middle of one ends the
// connection. They fail with *ServerError where the server refuses.
type Control struct {
	mu   sync.Mutex
	conn *conn
}

// Dial connects to the server's socket.
func Dial(ctx context.Context, socket string) (*Control, error) {
	k, err := dial(ctx, socket)
	if err != nil {
		return nil, err
	}
	return &Control{conn: k}, nil
}

// Close ends the connection.
func (c *Control) Close() error { return c.conn.sock.Close() }

func (c *Control) named(ctx context.Context, t wire.Type, n wire.Named) ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	body, _, err := c.conn.ask(ctx, t, n.Append(nil), 0)
	return append([]byte(nil), body...), err
}

// Create makes a volume of size bytes called POOL/VOLUME.
func (c *Control) Create(ctx context.Context, volume string, size uint64) error {
	_, err := c.named(ctx, wire.Create, wire.Named{Value: size, Name: volume})
	return err
}

// Resize changes a volume's size, in bytes.
func (c *Control) Resize(ctx context.Context, volume string, size uint64) error {
	_, err := c.named(ctx, wire.Resize, wire.Named{Value: size, Name: volume})
	return err
}

// Stat describes a volume.
func (c *Control) Stat(ctx context.Context, volume string) (wire.Volume, error) {
	body, err := c.named(ctx, wire.Stat, wire.Named{Name: volume})
	if err != nil {
		return wire.Volume{}, err
	}
	return wire.DecodeVolume(body)
}

// List returns the names of the volumes that the caller may use, sorted.
func (c *Control) List(ctx context.Context) ([]string, error) {
	var all []string
	for more, last := true, ""; more; {
		body, err := c.named(ctx, wire.List, wire.Named{Name: last})
		if err != nil {
			return nil, err
		}
		var names []string
		if names, more, err = wire.DecodeNames(body); err != nil {
			return nil, err
		}
		if len(names) > 0 {
			last = names[len(names)-1]
		}
		all = append(all, names...)
	}
	return all, nil
}

// Snapshot makes a snapshot of a volume.
func (c *Control) Snapshot(ctx context.Context, volume, snapshot string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, _, err := c.conn.ask(ctx, wire.Snapshot, wire.SnapshotRequest{Volume: volume, Snapshot: snapshot}.Append(nil), 0)
	return err
}
