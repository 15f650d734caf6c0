// Package albatest has what tests of the object store and of what is built on it
// share: a registry in memory, and a rig of storage daemons that can be made to fail.
package albatest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"scoria/alba"
)

// Registry is an alba.Registry in memory. Safe from any goroutine.
type Registry struct {
	mu       sync.Mutex
	kvs      map[string]alba.KV
	revision int64
	watchers map[*watcher]struct{}
	hook     func(writes []alba.Write) error
}

type watcher struct {
	prefix string
	events chan alba.Event
}

var _ alba.Registry = (*Registry)(nil)

// NewRegistry returns an empty registry.
func NewRegistry() *Registry {
	return &Registry{kvs: map[string]alba.KV{}, watchers: map[*watcher]struct{}{}}
}

// Backup returns a copy of the registry as it is now, without watchers and hook.
func (r *Registry) Backup() *Registry {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := NewRegistry()
	b.kvs, b.revision = maps.Clone(r.kvs), r.revision
	return b
}

// SetHook has fn called before each commit that would write something; its error is the
// commit's, which then has no effect. It runs without the registry's lock.
func (r *Registry) SetHook(fn func(writes []alba.Write) error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hook = fn
}

// Get implements alba.Registry.
func (r *Registry) Get(ctx context.Context, key string) (alba.KV, bool, error) {
	if err := ctx.Err(); err != nil {
		return alba.KV{}, false, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	kv, ok := r.kvs[key]
	return kv, ok, nil
}

// List implements alba.Registry.
func (r *Registry) List(ctx context.Context, prefix string) ([]alba.KV, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var list []alba.KV
	for k, kv := range r.kvs {
		if strings.HasPrefix(k, prefix) {
			list = append(list, kv)
		}
	}
	slices.SortFunc(list, func(a, b alba.KV) int { return strings.Compare(a.Key, b.Key) })
	return list, nil
}

// Commit implements alba.Registry.
func (r *Registry) Commit(ctx context.Context, compares []alba.Compare, writes []alba.Write) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if len(compares) > alba.MaxCommitWrites || len(writes) > alba.MaxCommitWrites {
		return 0, fmt.Errorf("%d compares, %d writes: at most %d of each", len(compares), len(writes), alba.MaxCommitWrites)
	}
	r.mu.Lock()
	hook := r.hook
	r.mu.Unlock()
	if hook != nil && len(writes) > 0 {
		if err := hook(writes); err != nil {
			return 0, err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range compares {
		if got := r.kvs[c.Key].Revision; got != c.Revision {
			return 0, fmt.Errorf("%w: %s is at revision %d, not %d", alba.ErrConflict, c.Key, got, c.Revision)
		}
	}
	if len(writes) == 0 {
		return r.revision, nil
	}
	r.revision++
	for _, w := range writes {
		kv := alba.KV{Key: w.Key, Value: slices.Clone(w.Value), Revision: r.revision}
		if w.Value == nil {
			delete(r.kvs, w.Key)
		} else {
			r.kvs[w.Key] = kv
		}
		for wa := range r.watchers {
			if !strings.HasPrefix(w.Key, wa.prefix) {
				continue
			}
			select {
			case wa.events <- alba.Event{KV: kv}:
			default:
				delete(r.watchers, wa)
				close(wa.events)
			}
		}
	}
	return r.revision, nil
}

// Watch implements alba.Registry, from now on.
func (r *Registry) Watch(ctx context.Context, prefix string, from int64) (<-chan alba.Event, error) {
	if from != 0 {
		return nil, fmt.Errorf("watch from revision %d: only from now on", from)
	}
	w := &watcher{prefix: prefix, events: make(chan alba.Event, 256)}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.watchers[w] = struct{}{}
	context.AfterFunc(ctx, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if _, ok := r.watchers[w]; ok {
			delete(r.watchers, w)
			close(w.events)
		}
	})
	return w.events, nil
}
