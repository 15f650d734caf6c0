package asdtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"scoria/alba/asd"
)

// Model is an asd.Client as plain as can be: a map under a mutex. It is what
// other Clients are compared with, and a stand-in for an ASD in tests of what is
// built on them. It does not check limits, is never full and never fails.
type Model struct {
	mu     sync.Mutex
	id     string
	values map[string]asd.Value
	epochs map[string]uint64
	closed bool
}

var _ asd.Client = (*Model)(nil)

// NewModel returns an empty Model with this id.
func NewModel(id string) *Model {
	return &Model{id: id, values: make(map[string]asd.Value), epochs: make(map[string]uint64)}
}

// Clone returns a Model with the same contents.
func (m *Model) Clone() *Model {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := NewModel(m.id)
	for k, v := range m.values {
		c.values[k] = v
	}
	for k, v := range m.epochs {
		c.epochs[k] = v
	}
	return c
}

func (m *Model) enter(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return asd.ErrClosed
	}
	return nil
}

// Corrupt flips a byte of a stored value: reads of that block fail from now on.
// It reports whether there is such a byte.
func (m *Model) Corrupt(key string, off int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	v, ok := m.values[key]
	if !ok || off < 0 || off >= int64(len(v.Data)) {
		return false
	}
	v.Data = bytes.Clone(v.Data)
	v.Data[off] ^= 0x40
	m.values[key] = v
	return true
}

func (m *Model) get(key string) (asd.Value, error) {
	v, ok := m.values[key]
	if !ok {
		return asd.Value{}, fmt.Errorf("key %q: %w", key, asd.ErrNoKey)
	}
	if err := v.Check(key); err != nil {
		return asd.Value{}, err
	}
	return asd.Value{Data: bytes.Clone(v.Data), BlockSize: v.BlockSize, CRCs: v.CRCs}, nil
}

// Get implements asd.Client.
func (m *Model) Get(ctx context.Context, key string, _ asd.Priority) (asd.Value, error) {
	if err := m.enter(ctx); err != nil {
		return asd.Value{}, err
	}
	defer m.mu.Unlock()
	return m.get(key)
}

// MultiGet implements asd.Client.
func (m *Model) MultiGet(ctx context.Context, keys []string, _ asd.Priority) ([]asd.Result, error) {
	if err := m.enter(ctx); err != nil {
		return nil, err
	}
	defer m.mu.Unlock()
	results := make([]asd.Result, len(keys))
	left, full := asd.MaxValueBytes, false
	for i, key := range keys {
		if full = full || len(m.values[key].Data) > left; full {
			results[i].Err = asd.ErrTooMuch
			continue
		}
		results[i].Value, results[i].Err = m.get(key)
		left -= len(results[i].Value.Data)
	}
	return results, nil
}

// ReadAt implements asd.Client.
func (m *Model) ReadAt(ctx context.Context, key string, p []byte, off int64, _ asd.Priority) (asd.ReadInfo, error) {
	if err := m.enter(ctx); err != nil {
		return asd.ReadInfo{}, err
	}
	defer m.mu.Unlock()
	v, ok := m.values[key]
	switch {
	case !ok:
		return asd.ReadInfo{}, fmt.Errorf("key %q: %w", key, asd.ErrNoKey)
	case off < 0:
		return asd.ReadInfo{}, fmt.Errorf("key %q: offset %d: %w", key, off, asd.ErrInvalid)
	case off+int64(len(p)) > int64(len(v.Data)):
		return asd.ReadInfo{}, io.ErrUnexpectedEOF
	}
	bs := int64(v.BlockSize)
	first := off / bs
	last := min((off+int64(len(p))+bs-1)/bs, int64(len(v.CRCs)))
	for i := first; i < last; i++ {
		b := v.Data[i*bs : min((i+1)*bs, int64(len(v.Data)))]
		if asd.CRC(b) != v.CRCs[i] {
			return asd.ReadInfo{}, &asd.CorruptError{Key: key, Off: i * bs, Size: int64(len(b)), Reason: "fails its checksum"}
		}
	}
	copy(p, v.Data[off:])
	return asd.ReadInfo{Size: int64(len(v.Data)), BlockSize: v.BlockSize, FirstBlock: int(first), CRCs: v.CRCs[first:max(first, last)]}, nil
}

func (m *Model) info(key string) asd.Info {
	v, ok := m.values[key]
	if !ok {
		return asd.Info{Key: key}
	}
	return asd.Info{Key: key, Exists: true, Size: int64(len(v.Data)), BlockSize: v.BlockSize, Sum: v.Sum()}
}

// Exists implements asd.Client.
func (m *Model) Exists(ctx context.Context, keys []string, _ asd.Priority) ([]asd.Info, error) {
	if err := m.enter(ctx); err != nil {
		return nil, err
	}
	defer m.mu.Unlock()
	infos := make([]asd.Info, len(keys))
	for i, key := range keys {
		infos[i] = m.info(key)
	}
	return infos, nil
}

func (m *Model) keys() []string {
	keys := make([]string, 0, len(m.values))
	for k := range m.values {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// Range implements asd.Client.
func (m *Model) Range(ctx context.Context, req asd.RangeRequest, _ asd.Priority) (asd.RangeResult, error) {
	if err := m.enter(ctx); err != nil {
		return asd.RangeResult{}, err
	}
	defer m.mu.Unlock()
	limit := req.Limit
	if limit <= 0 || limit > asd.MaxKeys {
		limit = asd.MaxKeys
	}
	var res asd.RangeResult
	for _, key := range m.keys() {
		switch {
		case key < req.From, req.After && key == req.From, req.To != "" && key >= req.To:
		case len(res.Infos) == limit:
			res.More = true
			return res, nil
		default:
			res.Infos = append(res.Infos, m.info(key))
		}
	}
	return res, nil
}

func (m *Model) assert(i int, a *asd.Assert) error {
	v, ok := m.values[a.Key]
	holds := false
	switch a.Kind {
	case asd.KindAssertAbsent:
		holds = !ok
	case asd.KindAssertValue:
		holds = ok && bytes.Equal(v.Data, a.Data)
	case asd.KindAssertSum:
		holds = ok && int64(len(v.Data)) == a.Size && v.Sum() == a.Sum
	case asd.KindAssertEpoch:
		holds = true // looked at before
	}
	if !holds {
		return &asd.AssertError{Index: i, Assert: *a, Reason: "so says the model"}
	}
	return nil
}

// Apply implements asd.Client.
func (m *Model) Apply(ctx context.Context, asserts []asd.Assert, updates []asd.Update, _ asd.Priority) error {
	for i := range updates {
		if u := &updates[i]; u.Kind == asd.KindPut {
			if err := u.Value.Check(u.Key); err != nil {
				return err
			}
		}
	}
	if err := m.enter(ctx); err != nil {
		return err
	}
	defer m.mu.Unlock()
	for i := range asserts {
		if a := &asserts[i]; a.Kind == asd.KindAssertEpoch && m.epochs[a.Key] > a.Epoch {
			return &asd.StaleEpochError{Namespace: a.Key, Epoch: a.Epoch, Known: m.epochs[a.Key]}
		}
	}
	raised := make(map[string]uint64)
	for i := range updates {
		if u := &updates[i]; u.Kind == asd.KindRaiseEpoch {
			if known := max(m.epochs[u.Key], raised[u.Key]); known > u.Epoch {
				return &asd.StaleEpochError{Namespace: u.Key, Epoch: u.Epoch, Known: known}
			}
			raised[u.Key] = u.Epoch
		}
	}
	for i := range asserts {
		if err := m.assert(i, &asserts[i]); err != nil {
			return err
		}
	}
	for i := range updates {
		switch u := &updates[i]; u.Kind {
		case asd.KindPut:
			// A new value: what was verified on its way in is not from then on.
			m.values[u.Key] = asd.Value{Data: bytes.Clone(u.Value.Data), BlockSize: u.Value.BlockSize, CRCs: slices.Clone(u.Value.CRCs)}
		case asd.KindDelete:
			delete(m.values, u.Key)
		case asd.KindRaiseEpoch:
			m.epochs[u.Key] = u.Epoch
		}
	}
	return nil
}

// Epochs implements asd.Client.
func (m *Model) Epochs(ctx context.Context, after string) ([]asd.NamespaceEpoch, bool, error) {
	if err := m.enter(ctx); err != nil {
		return nil, false, err
	}
	defer m.mu.Unlock()
	var epochs []asd.NamespaceEpoch
	for ns, e := range m.epochs {
		if ns > after {
			epochs = append(epochs, asd.NamespaceEpoch{Namespace: ns, Epoch: e})
		}
	}
	slices.SortFunc(epochs, func(a, b asd.NamespaceEpoch) int { return strings.Compare(a.Namespace, b.Namespace) })
	more := len(epochs) > asd.MaxKeys
	return epochs[:min(len(epochs), asd.MaxKeys)], more, nil
}

// Verify implements asd.Client: everything in one stretch.
func (m *Model) Verify(ctx context.Context, _ asd.VerifyRequest) (asd.VerifyResult, error) {
	if err := m.enter(ctx); err != nil {
		return asd.VerifyResult{}, err
	}
	defer m.mu.Unlock()
	res := asd.VerifyResult{Done: true}
	for _, key := range m.keys() {
		v := m.values[key]
		res.Keys++
		res.Bytes += int64(len(v.Data))
		var bad *asd.CorruptError
		if err := v.Check(key); errors.As(err, &bad) {
			res.Bad = append(res.Bad, asd.BadBlocks{Key: key, Off: bad.Off, Size: bad.Size, Reason: bad.Reason})
		}
	}
	return res, nil
}

// Stats implements asd.Client.
func (m *Model) Stats(ctx context.Context) (asd.Stats, error) {
	if err := m.enter(ctx); err != nil {
		return asd.Stats{}, err
	}
	defer m.mu.Unlock()
	s := asd.Stats{ID: m.id, Version: "model", Capacity: 1 << 40, Keys: int64(len(m.values))}
	for _, v := range m.values {
		s.Bytes += int64(len(v.Data))
	}
	s.Used = s.Bytes
	return s, nil
}

// Close implements asd.Client.
func (m *Model) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	return nil
}
