package host

import (
	"context"

	"scoria/alba/proxy"
	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/registry"
)

// Registry is the registry of one host.
type Registry interface {
	registry.Store
	// Err returns why it refuses commits, nil while it does not.
	Err() error
}

// Parts are what a daemon stands on. A test gives it some that it can kill and whose
// power it can take away; what is left out is the host's own. Sockets are always
// real.
type Parts struct {
	FS           vfs.FS // everything but the registry and the sockets
	BootID       string // changes when the host restarts
	OpenRegistry func(file string) (Registry, error)
	OpenEngine   func(ctx context.Context, c driver.Config) (Engine, error)
	// DialASD opens the clients of storage daemons; one that names no directory is
	// neither opened nor closed by this daemon.
	DialASD proxy.Dial
}

func (p *Parts) complete() (err error) {
	if p.FS == nil {
		p.FS = vfs.OS()
	}
	if p.BootID == "" {
		if p.BootID, err = readBootID(); err != nil {
			return err
		}
	}
	if p.OpenRegistry == nil {
		p.OpenRegistry = func(file string) (Registry, error) { return registry.Open(file) }
	}
	if p.OpenEngine == nil {
		p.OpenEngine = OpenEngine
	}
	return nil
}
