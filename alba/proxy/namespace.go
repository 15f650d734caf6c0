package proxy

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"scoria/alba"
)

// namespace is a record with its revision.
type namespace struct {
	alba.Namespace
	rev int64
}

// loadNamespace reads a namespace from the registry: ErrNoNamespace if there is
// none or it is being deleted (then with the record).
func (p *Proxy) loadNamespace(ctx context.Context, name string) (namespace, error) {
	kv, ok, err := p.reg.Get(ctx, alba.NamespaceKey(name))
	if err != nil {
		return namespace{}, err
	}
	if !ok {
		return namespace{}, ErrNoNamespace
	}
	rec, err := alba.Decode[alba.Namespace](kv.Value)
	if err == nil && rec.Deleting {
		err = fmt.Errorf("being deleted: %w", ErrNoNamespace)
	}
	return namespace{rec, kv.Revision}, err
}

// owned is loadNamespace for an owner of that epoch.
func (p *Proxy) owned(ctx context.Context, name string, epoch uint64) (namespace, error) {
	n, err := p.loadNamespace(ctx, name)
	if err == nil && epoch < n.Epoch {
		err = fmt.Errorf("epoch %d, the namespace is at %d: %w", epoch, n.Epoch, ErrStaleEpoch)
	}
	return n, err
}

func (n *namespace) compare() alba.Compare {
	return alba.Compare{Key: alba.NamespaceKey(n.Name), Revision: n.rev}
}

func (n *namespace) write() alba.Write {
	return alba.Write{Key: alba.NamespaceKey(n.Name), Value: alba.Encode(n.Namespace)}
}

// LoadPreset reads a preset from the registry: ErrNoPreset if there is none.
func LoadPreset(ctx context.Context, reg alba.Registry, name string) (alba.Preset, error) {
	kv, ok, err := reg.Get(ctx, alba.PresetKey(name))
	if err != nil {
		return alba.Preset{}, err
	}
	if !ok {
		return alba.Preset{}, fmt.Errorf("%q: %w", name, ErrNoPreset)
	}
	ps, err := alba.Decode[alba.Preset](kv.Value)
	if err == nil {
		err = ps.Check()
	}
	if err != nil {
		return ps, fmt.Errorf("%s: %w", kv.Key, err)
	}
	return ps, nil
}

// CreateNamespace makes a namespace with the proxy's default preset; no error if it
// exists.
func (p *Proxy) CreateNamespace(ctx context.Context, ns string) error {
	return p.CreateNamespaceWith(ctx, ns, p.opts.Preset)
}

// CreateNamespaceWith makes a namespace with a preset; no error if it exists, with
// whatever preset.
func (p *Proxy) CreateNamespaceWith(ctx context.Context, ns, preset string) error {
	err := p.check(ctx, ns, "-")
	for range tries {
		if err != nil {
			break
		}
		var n namespace
		if n, err = p.loadNamespace(ctx, ns); err == nil {
			return nil
		}
		if !errors.Is(err, ErrNoNamespace) {
			break
		}
		if n.Deleting { // somebody died in the middle of it
			err = p.finishDelete(ctx, n)
			continue
		}
		if _, err = LoadPreset(ctx, p.reg, preset); err != nil {
			break
		}
		n = namespace{Namespace: alba.Namespace{Name: ns, ID: alba.NewID(), Preset: preset, Created: now()}}
		_, err = p.reg.Commit(ctx, []alba.Compare{n.compare()}, []alba.Write{n.write()})
		if !errors.Is(err, alba.ErrConflict) {
			break
		}
		err = nil
	}
	return opError("create namespace", ns, "", err)
}

// Namespaces lists all namespaces, sorted.
func (p *Proxy) Namespaces(ctx context.Context) ([]string, error) {
	err := p.check(ctx, "-", "-")
	var kvs []alba.KV
	if err == nil {
		kvs, err = p.reg.List(ctx, alba.NamespacePrefix)
	}
	names := make([]string, 0, len(kvs))
	for _, kv := range kvs {
		rec, derr := alba.Decode[alba.Namespace](kv.Value)
		if derr != nil {
			err = derr
			break
		}
		if !rec.Deleting {
			names = append(names, rec.Name)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("object store: list namespaces: %w", err)
	}
	slices.Sort(names)
	return names, nil
}

// Fence durably raises the namespace's epoch; ErrStaleEpoch if it is larger already,
// equal is fine. When it returns, no commit of a smaller epoch can succeed; the
// devices that are up refuse smaller epochs too, the others learn of it with the
// next write of the new owner.
func (p *Proxy) Fence(ctx context.Context, ns string, epoch uint64) error {
	err := p.check(ctx, ns, "-")
	var n namespace
	for range tries {
		if err != nil {
			break
		}
		if n, err = p.owned(ctx, ns, epoch); err != nil || n.Epoch == epoch {
			break
		}
		n.Epoch = epoch
		var rev int64
		rev, err = p.reg.Commit(ctx, []alba.Compare{n.compare()}, []alba.Write{n.write()})
		if err == nil {
			n.rev = rev
			break
		}
		if errors.Is(err, alba.ErrConflict) {
			err = nil
			continue
		}
	}
	if err == nil && n.Epoch != epoch {
		err = ErrBusy
	}
	if err == nil {
		p.fenceDevices(ctx, &n)
	}
	return opError("fence", ns, "", err)
}
