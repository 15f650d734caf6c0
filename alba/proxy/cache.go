package proxy

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"scoria/alba"
	"scoria/alba/asd"
	"scoria/alba/erasure"
)

// entry is an object as the registry has it. Never changed once others know it.
type entry struct {
	m   *alba.Manifest
	rev int64
	obj *erasure.Object
	ns  namespace
	pri asd.Priority // of reads
}

// cache keeps namespaces and manifests by their keys in the registry. Everything is
// dropped when its key changes; what was being loaded at that time isn't kept.
// Bounded: when it is full, half of it goes, whatever comes first.
type cache struct {
	mu         sync.Mutex
	limit      int
	changes    uint64 // counts drops
	namespaces map[string]namespace
	objects    map[string]*entry
}

func (c *cache) init(limit int) {
	c.limit = limit
	c.namespaces = map[string]namespace{}
	c.objects = map[string]*entry{}
}

func (c *cache) drop(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changes++
	delete(c.namespaces, key)
	delete(c.objects, key)
}

func (c *cache) dropAll() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changes++
	clear(c.namespaces)
	clear(c.objects)
}

// lookup finds a namespace and, in it, an object. What is not there is zero.
func (c *cache) lookup(ns, name string) (n namespace, e *entry, changes uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, ok := c.namespaces[alba.NamespaceKey(ns)]
	if ok {
		e = c.objects[alba.ObjectKey(n.ID, name)]
	}
	return n, e, c.changes
}

// keep remembers what was loaded if nothing was dropped since changes.
func (c *cache) keep(n namespace, e *entry, changes uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.changes != changes {
		return
	}
	if len(c.namespaces) > c.limit {
		clear(c.namespaces)
	}
	c.namespaces[alba.NamespaceKey(n.Name)] = n
	if len(c.objects) >= c.limit {
		drop := len(c.objects) / 2
		for k := range c.objects {
			if delete(c.objects, k); drop == 0 {
				break
			}
			drop--
		}
	}
	c.objects[alba.ObjectKey(n.ID, e.m.Object)] = e
}

// entry returns an object, from the cache unless fresh: ErrNoObject if there is none.
func (p *Proxy) entry(ctx context.Context, ns, name string, fresh bool) (*entry, error) {
	_, e, changes := p.cache.lookup(ns, name)
	if e != nil && !fresh {
		return e, nil
	}
	p.counters.ManifestMisses.Add(1)
	n, err := p.loadNamespace(ctx, ns)
	if errors.Is(err, ErrNoNamespace) {
		return nil, fmt.Errorf("%w (%w)", ErrNoObject, err)
	}
	if err != nil {
		return nil, err
	}
	e, err = p.loadEntry(ctx, n, name)
	if err == nil {
		p.cache.keep(n, e, changes)
	}
	return e, err
}

// loadEntry reads an object's manifest from the registry.
func (p *Proxy) loadEntry(ctx context.Context, n namespace, name string) (*entry, error) {
	e, err := p.loadManifest(ctx, n, name)
	if err != nil {
		return nil, err
	}
	return p.newEntry(n, e.m, e.rev)
}

func (p *Proxy) newEntry(n namespace, m *alba.Manifest, rev int64) (*entry, error) {
	var key []byte
	var err error
	if m.Encryption != alba.EncryptNone {
		if key, err = p.opts.Keys.Unwrap(n.ID, n.Key); err != nil {
			return nil, err
		}
	}
	obj, err := erasure.NewObject(m, key)
	if err != nil {
		return nil, err
	}
	return &entry{m: m, rev: rev, obj: obj, ns: n}, nil
}
