package proxy

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"scoria/alba"
	"scoria/alba/asd"
	"scoria/alba/place"
)

// Member is one device of the fleet.
type Member struct {
	health
	fleet *Fleet

	mu      sync.Mutex
	rec     alba.Device
	rev     int64      // of rec in the registry
	client  asd.Client // nil until it was dialed
	stats   asd.Stats
	statted time.Time        // of stats
	failing time.Time        // since when they say that its disk has failed; zero: they don't
	full    time.Time        // a put was refused then
	copies  map[string]int64 // revision of the copy it has, by namespace ID
	checked bool             // what it was told is known to the registry
	older   error            // ErrOlder: it is not
	told    alba.Position    // what it was told last
}

func (m *Member) close() {
	m.mu.Lock()
	c := m.client
	m.client = nil
	m.mu.Unlock()
	if c != nil {
		_ = c.Close()
	}
}

func (m *Member) replace(d alba.Device, rev int64) {
	m.mu.Lock()
	moved := m.rec.Address != d.Address
	m.rec, m.rev = d, rev
	if moved {
		m.checked, m.told = false, 0
	}
	m.mu.Unlock()
	if moved || d.State == alba.DeviceRemoved {
		m.close()
	}
}

// Record returns the device's record.
func (m *Member) Record() alba.Device {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rec
}

// Down returns why and since when the device can't be used; "" if it can. One whose
// disk failed is down although it may still be read.
func (m *Member) Down() (reason string, since time.Time) {
	if reason, since = m.down(); reason != "" {
		return reason, since
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.stats.Failed, m.failing
}

// Up says that the device answered last time, or may be asked again.
func (m *Member) Up() bool { return m.up(time.Now()) }

// Client returns the device's client, dialed if need be. An error counts against
// the device. ErrOlder if it was told of changes that the registry lacks. One that was
// removed has none, whether it could be reached or not.
func (m *Member) Client(ctx context.Context) (asd.Client, error) {
	c, err := m.dialed(ctx)
	if err == nil {
		err = m.checkRegistry(ctx, c)
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (m *Member) dialed(ctx context.Context) (asd.Client, error) {
	m.mu.Lock()
	c, rec := m.client, m.rec
	m.mu.Unlock()
	if rec.State == alba.DeviceRemoved {
		return nil, fmt.Errorf("device %s was removed: %w", rec.ID, asd.ErrUnavailable)
	}
	if c != nil {
		return c, nil
	}
	c, err := m.fleet.dial(ctx, rec)
	if err != nil {
		err = fmt.Errorf("device %s at %s: %w (%w)", rec.ID, rec.Address, asd.ErrUnavailable, err)
		if ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded) { // else it was canceled by us: says nothing
			m.failed(time.Now(), err)
		}
		return nil, err
	}
	m.mu.Lock()
	old, now := m.client, m.rec
	current := now.Address == rec.Address && now.State != alba.DeviceRemoved
	if current && old == nil {
		m.client = c
	}
	m.mu.Unlock()
	switch {
	case !current:
		_ = c.Close()
		return nil, fmt.Errorf("device %s was moved or removed meanwhile: %w", rec.ID, asd.ErrUnavailable)
	case old != nil: // somebody else was faster
		_ = c.Close()
		return old, nil
	}
	return c, nil
}

// note records the outcome of a request for the device's health and returns err.
func (m *Member) note(ctx context.Context, took time.Duration, err error) error {
	switch {
	case err == nil:
		m.ok(took)
	case ctx.Err() != nil && !errors.Is(ctx.Err(), context.DeadlineExceeded):
		// Canceled by us: says nothing.
	case errors.Is(err, asd.ErrClosed):
		m.failed(time.Now(), err)
		m.mu.Lock()
		m.client = nil // dial anew
		m.mu.Unlock()
	case errors.Is(err, asd.ErrFull):
		m.mu.Lock()
		m.full = time.Now()
		m.mu.Unlock()
		m.ok(0)
	case answered(err):
		m.ok(0)
	default:
		m.failed(time.Now(), err)
	}
	return err
}

// Poll asks the device for its statistics, unless it is to be left alone yet.
func (m *Member) Poll(ctx context.Context) {
	if !m.Up() || m.Record().State == alba.DeviceRemoved {
		return
	}
	begun := time.Now()
	ctx, cancel := context.WithTimeout(ctx, statTimeout)
	defer cancel()
	c, err := m.Client(ctx)
	if err != nil {
		return
	}
	st, err := c.Stats(ctx)
	if err == nil && st.ID != m.Record().ID {
		err = fmt.Errorf("ASD %s answers: %w", st.ID, asd.ErrWrongASD)
	}
	if err == nil && st.Failed != "" {
		err = fmt.Errorf("%s: %w", st.Failed, asd.ErrFailed)
	}
	if m.note(ctx, 0, err) != nil && !errors.Is(err, asd.ErrFailed) {
		return
	}
	m.mu.Lock()
	m.stats, m.statted = st, time.Now()
	switch {
	case st.Failed == "":
		m.failing = time.Time{}
	case m.failing.IsZero():
		m.failing = m.statted
	}
	if !st.Full && m.full.Before(begun) { // it was not found to be full meanwhile
		m.full = time.Time{}
	}
	m.mu.Unlock()
}

func (m *Member) unknown() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.statted.IsZero()
}

// Stats returns the statistics that were asked for last, and when; the zero time if
// never.
func (m *Member) Stats() (asd.Stats, time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.stats, m.statted
}

// Damaged says what is wrong with the device's key-value store, "" if nothing is known
// to be: what it holds belongs elsewhere.
func (m *Member) Damaged() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.stats.Damaged
}

func (m *Member) isFull() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.stats.Full || !m.full.IsZero()
}

// State is what placement knows of the device.
func (m *Member) State() place.Device {
	up := m.Up()
	reason, _ := m.Down()
	m.mu.Lock()
	defer m.mu.Unlock()
	return place.Device{
		Device: m.rec, Free: max(0, m.stats.Capacity-m.stats.Used), Capacity: m.stats.Capacity,
		Usable: up && reason == "" && m.rec.State == alba.DeviceActive && !m.statted.IsZero() &&
			!m.stats.Full && m.full.IsZero() && m.stats.Failed == "",
	}
}

// Apply is asd.Client.Apply on the device; an unknown outcome is found out by
// repeating, which asserts and keys that are used once make safe.
func (m *Member) Apply(ctx context.Context, asserts []asd.Assert, updates []asd.Update, pri asd.Priority) error {
	c, err := m.Client(ctx)
	if err != nil {
		return err
	}
	const attempts = 3
	for range attempts {
		err = c.Apply(ctx, asserts, updates, pri)
		if !errors.Is(err, asd.ErrUnknownOutcome) || ctx.Err() != nil {
			break
		}
	}
	return m.note(ctx, 0, err)
}

// ApplyOwned is Apply for the owner of a namespace: with its epoch asserted, the
// namespace's epoch raised where the device has not heard of it, and a copy of the
// namespace's record unless the device has a later one.
func (m *Member) ApplyOwned(ctx context.Context, n *namespace, epoch uint64, updates []asd.Update, pri asd.Priority) error {
	return m.owned(n, epoch, updates, func(asserts []asd.Assert, updates []asd.Update) error {
		return m.Apply(ctx, asserts, updates, pri)
	})
}

// owned calls apply with what ApplyOwned adds.
func (m *Member) owned(n *namespace, epoch uint64, updates []asd.Update, apply func([]asd.Assert, []asd.Update) error) error {
	id := n.ID.String()
	all := make([]asd.Update, 0, len(updates)+2)
	all = append(all, updates...)
	if n.Epoch > 0 {
		all = append(all, asd.RaiseEpoch(id, n.Epoch))
	}
	m.mu.Lock()
	known := m.copies[id]
	m.mu.Unlock()
	asserts := []asd.Assert{asd.AssertEpoch(id, epoch)}
	if known >= n.rev {
		return apply(asserts, all)
	}
	err := apply(asserts, append(all, namespaceCopy(&n.Namespace)...))
	if staleName(err) == alba.CopyName(n.ID) {
		err = apply(asserts, all)
	}
	if err == nil {
		m.mu.Lock()
		if len(m.copies) >= maxCopies {
			clear(m.copies)
		}
		m.copies[id] = n.rev
		m.mu.Unlock()
	}
	return err
}

// namespaceCopy puts a copy of a namespace's record; of two the later one stays.
func namespaceCopy(n *alba.Namespace) []asd.Update {
	return []asd.Update{asd.RaiseEpoch(alba.CopyName(n.ID), n.CopyOrder()), asd.Put(alba.NamespaceCopyKey(n.ID), asd.NewValue(alba.Encode(*n)))}
}

// staleName is the name whose epoch a device knows a later one of; "" if err says
// anything else.
func staleName(err error) string {
	var stale *asd.StaleEpochError
	if errors.As(err, &stale) {
		return stale.Namespace
	}
	return ""
}

// ReadAt is asd.Client.ReadAt on the device.
func (m *Member) ReadAt(ctx context.Context, key string, p []byte, off int64, pri asd.Priority) error {
	c, err := m.Client(ctx)
	if err != nil {
		return err
	}
	start := time.Now()
	_, err = c.ReadAt(ctx, key, p, off, pri)
	return m.note(ctx, smallRead(p, time.Since(start), pri), err)
}

// smallRead returns what a read's duration says about small ones; 0 for nothing.
func smallRead(p []byte, took time.Duration, pri asd.Priority) time.Duration {
	if len(p) > 64<<10 || pri != asd.PriorityGuest {
		return 0
	}
	return max(took, 1)
}

// dropTombstone deletes a key if it is there.
func (m *Member) dropTombstone(ctx context.Context, key string) error {
	c, err := m.Client(ctx)
	if err != nil {
		return err
	}
	infos, err := c.Exists(ctx, []string{key}, asd.PriorityRepair)
	if m.note(ctx, 0, err) != nil || !infos[0].Exists {
		return err
	}
	return m.Apply(ctx, nil, []asd.Update{asd.Delete(key)}, asd.PriorityRepair)
}
