package proxy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"scoria/alba"
	"scoria/alba/asd"
)

// Errors of administration.
var (
	// ErrForeign: the device belongs to another cluster, or to this one before its
	// registry was lost (then the registry must be rebuilt from the devices first).
	ErrForeign = errors.New("device belongs to another cluster")
	ErrDevice  = errors.New("no such device")
	// ErrRemoved: the device was removed, and what it had has been rebuilt elsewhere or
	// given up. What is on it is old: it is never taken in again under its ID.
	ErrRemoved = errors.New("device was removed for good")
)

// clusterID returns the cluster's ID, made at the first call.
func (p *Proxy) clusterID(ctx context.Context) (alba.ID, error) {
	for range tries {
		kv, ok, err := p.reg.Get(ctx, alba.ClusterKey)
		if err != nil {
			return alba.ID{}, err
		}
		if ok {
			return alba.ParseID(string(kv.Value))
		}
		_, err = p.reg.Commit(ctx, []alba.Compare{{Key: alba.ClusterKey}},
			[]alba.Write{{Key: alba.ClusterKey, Value: []byte(alba.NewID().String())}})
		if err != nil && !errors.Is(err, alba.ErrConflict) {
			return alba.ID{}, err
		}
	}
	return alba.ID{}, ErrBusy
}

// Own checks that a device belongs to this cluster, and claims it if it belongs to
// none: ErrForeign otherwise.
func (p *Proxy) Own(ctx context.Context, c asd.Client) error {
	id, err := p.clusterID(ctx)
	if err != nil {
		return err
	}
	want := []byte(id.String())
	err = c.Apply(ctx, []asd.Assert{asd.AssertAbsent(alba.ClusterCopyKey)},
		[]asd.Update{asd.Put(alba.ClusterCopyKey, asd.NewValue(want))}, asd.PriorityGuest)
	if err == nil || !errors.Is(err, asd.ErrAssert) && !errors.Is(err, asd.ErrFull) {
		return err
	}
	v, err := c.Get(ctx, alba.ClusterCopyKey, asd.PriorityGuest)
	if err == nil && string(v.Data) != string(want) {
		err = fmt.Errorf("of cluster %.40q, this one is %v: %w", v.Data, id, ErrForeign)
	}
	return err
}

// AddDevice takes a device into the registry. d.ID may be empty, else the ASD at
// d.Address must be that one. A device that is there gets the new address and
// place and becomes active, also one that was removed, as long as objects refer to it:
// then it brings back what is not rebuilt yet. ErrRemoved after that.
func (p *Proxy) AddDevice(ctx context.Context, d alba.Device) (alba.Device, error) {
	fail := func(err error) (alba.Device, error) {
		return d, fmt.Errorf("add ASD at %s: %w", d.Address, err)
	}
	c, err := p.opts.Dial(ctx, d)
	if err != nil {
		return fail(err)
	}
	st, err := c.Stats(ctx)
	if err == nil && d.ID != "" && st.ID != d.ID {
		err = fmt.Errorf("ASD %s answers, not %s: %w", st.ID, d.ID, asd.ErrWrongASD)
	}
	if err == nil {
		err = p.checkRemoved(ctx, st.ID)
	}
	if err == nil {
		err = p.Own(ctx, c)
	}
	if err == nil {
		err = p.checkPosition(ctx, st.ID, c)
	}
	if cerr := c.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fail(err)
	}
	d.ID, d.State = st.ID, alba.DeviceActive
	for range tries {
		kv, ok, err := p.reg.Get(ctx, alba.DeviceKey(d.ID))
		if err != nil {
			return fail(err)
		}
		d.Added = now()
		if ok {
			old, err := alba.Decode[alba.Device](kv.Value)
			if err != nil {
				return fail(err)
			}
			d.Added = old.Added
		}
		if err := d.Check(); err != nil {
			return fail(err)
		}
		rev, err := p.reg.Commit(ctx, []alba.Compare{{Key: alba.DeviceKey(d.ID), Revision: kv.Revision}, {Key: alba.RemovedKey(d.ID)}},
			[]alba.Write{{Key: alba.DeviceKey(d.ID), Value: alba.Encode(d)}})
		if errors.Is(err, alba.ErrConflict) {
			if err := p.checkRemoved(ctx, d.ID); err != nil {
				return fail(err)
			}
			continue
		}
		if err == nil {
			p.saw(rev, true)
			err = p.fleet.Reload(ctx)
		}
		if err != nil {
			return fail(err)
		}
		if ok { // perhaps one that was removed
			p.copyToAll(ctx)
		} else if m := p.fleet.Member(d.ID); m != nil {
			p.CopyRecords(ctx, m)
		}
		return d, nil
	}
	return fail(ErrBusy)
}

// checkRemoved returns ErrRemoved if a device was removed and forgotten.
func (p *Proxy) checkRemoved(ctx context.Context, id string) error {
	_, ok, err := p.reg.Get(ctx, alba.RemovedKey(id))
	if err == nil && ok {
		err = fmt.Errorf("%s: %w", id, ErrRemoved)
	}
	return err
}

// ForgetDevice takes the record of a removed device out of the registry, to which no
// object and no upload may refer any more, and remembers its ID for good. No error if
// it was added again or is gone.
func (p *Proxy) ForgetDevice(ctx context.Context, id string) error {
	kv, ok, err := p.reg.Get(ctx, alba.DeviceKey(id))
	if err != nil || !ok {
		return err
	}
	d, err := alba.Decode[alba.Device](kv.Value)
	if err != nil {
		return fmt.Errorf("%s: %w", kv.Key, err)
	}
	if d.State != alba.DeviceRemoved {
		return nil
	}
	_, err = p.reg.Commit(ctx, []alba.Compare{{Key: kv.Key, Revision: kv.Revision}},
		[]alba.Write{{Key: kv.Key}, {Key: alba.RemovedKey(id), Value: kv.Value}})
	if errors.Is(err, alba.ErrConflict) {
		return nil
	}
	if err == nil {
		p.opts.Log.Info().Str("asd", id).Str("address", d.Address).Msg("nothing refers to the removed storage daemon any more: it is forgotten")
		err = p.fleet.Reload(ctx)
	}
	return err
}

// SetPreset makes or changes a preset: alba.ErrPreset if it breaks a rule. Objects
// that are stored already change when maintenance upgrades them.
func (p *Proxy) SetPreset(ctx context.Context, ps alba.Preset) error {
	if err := ps.Check(); err != nil {
		return err
	}
	if ps.Encryption != alba.EncryptNone && p.opts.Keys == nil {
		return fmt.Errorf("preset %s encrypts: %w", ps.Name, alba.ErrNoKey)
	}
	if _, err := p.reg.Commit(ctx, nil, []alba.Write{{Key: alba.PresetKey(ps.Name), Value: alba.Encode(ps)}}); err != nil {
		return fmt.Errorf("preset %s: %w", ps.Name, err)
	}
	for _, m := range p.fleet.Members() {
		p.CopyRecords(ctx, m)
	}
	return nil
}

// Presets returns all presets by name.
func (p *Proxy) Presets(ctx context.Context) ([]alba.Preset, error) {
	kvs, err := p.reg.List(ctx, alba.PresetPrefix)
	if err != nil {
		return nil, err
	}
	list := make([]alba.Preset, len(kvs))
	for i, kv := range kvs {
		if list[i], err = alba.Decode[alba.Preset](kv.Value); err != nil {
			return nil, fmt.Errorf("%s: %w", kv.Key, err)
		}
	}
	return list, nil
}

// CopyRecords puts copies of all presets and namespaces on a device, and which devices
// were removed, for a registry that has to be rebuilt. What fails is logged, and done again by maintenance.
func (p *Proxy) CopyRecords(ctx context.Context, m *Member) {
	if !m.Up() {
		return
	}
	if err := p.copyRecords(ctx, m); err != nil && ctx.Err() == nil {
		p.opts.Log.Info().Err(err).Str("asd", m.Record().ID).Msg("presets and namespaces were not copied to the device")
	}
}

func (p *Proxy) copyRecords(ctx context.Context, m *Member) error {
	copies, err := p.stated(ctx)
	if err != nil {
		return err
	}
	err = alba.Each(ctx, p.reg, alba.PresetPrefix, func(kv alba.KV) error {
		if p.opts.Silent {
			return nil
		}
		// Of two copies the one of the later change is the preset.
		changed, err := p.positionOf(ctx, kv.Revision)
		name := strings.TrimPrefix(kv.Key, alba.PresetPrefix)
		copies = append(copies, []asd.Update{asd.RaiseEpoch(alba.PresetCopyName(name), uint64(changed)),
			asd.Put(alba.PresetCopyKey(name), asd.NewValue(kv.Value))})
		return err
	})
	if err != nil {
		return err
	}
	err = alba.Each(ctx, p.reg, alba.NamespacePrefix, func(kv alba.KV) error {
		n, err := alba.Decode[alba.Namespace](kv.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", kv.Key, err)
		}
		if !n.Deleting {
			copies = append(copies, namespaceCopy(&n))
		}
		return nil
	})
	if err != nil {
		return err
	}
	for part := range slices.Chunk(copies, asd.MaxUpdates/2) {
		if err := m.putCopies(ctx, part); err != nil {
			return err
		}
	}
	return nil
}

// stated are what a device is to remember of the others: whether they were removed.
func (p *Proxy) stated(ctx context.Context) ([][]asd.Update, error) {
	if p.opts.Silent {
		return nil, nil
	}
	at, err := p.now(ctx)
	if err != nil {
		return nil, err
	}
	var list [][]asd.Update
	for _, prefix := range []string{alba.DevicePrefix, alba.RemovedPrefix} {
		err := alba.Each(ctx, p.reg, prefix, func(kv alba.KV) error {
			d, err := alba.Decode[alba.Device](kv.Value)
			if err != nil {
				return fmt.Errorf("%s: %w", kv.Key, err)
			}
			state := asd.Delete(alba.RemovedCopyKey(d.ID))
			if d.State == alba.DeviceRemoved {
				state = asd.Put(alba.RemovedCopyKey(d.ID), asd.NewValue(kv.Value))
			}
			list = append(list, []asd.Update{asd.RaiseEpoch(alba.StatedName(d.ID), uint64(at)), state})
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return list, nil
}

// copyToAll gives all devices that are in use and up copies of all records.
func (p *Proxy) copyToAll(ctx context.Context) {
	var g errgroup.Group
	for _, m := range p.fleet.Members() {
		if m.Record().State != alba.DeviceRemoved {
			g.Go(func() error { p.CopyRecords(ctx, m); return nil })
		}
	}
	_ = g.Wait()
}

// putCopies puts copies of records, but for those of which the device has later ones.
func (m *Member) putCopies(ctx context.Context, copies [][]asd.Update) error {
	for {
		limited, cancel := context.WithTimeout(ctx, purgeTimeout)
		err := m.Apply(limited, nil, slices.Concat(copies...), asd.PriorityRepair)
		cancel()
		name := staleName(err)
		if name == "" {
			return err
		}
		left := slices.DeleteFunc(slices.Clone(copies), func(c []asd.Update) bool { return c[0].Key == name })
		if len(left) == len(copies) || len(left) == 0 {
			return nil
		}
		copies = left
	}
}

// ErrOldKeys: devices still have copies of keys that are wrapped by another master key.
var ErrOldKeys = errors.New("an older master key is still needed")

// RotateKeys wraps the keys of all namespaces with the current master key, in the
// registry and in the copies on the devices, and returns how many were wrapped by
// another in the registry. It may be repeated, also after a crash in its middle. Older
// master keys are not needed any more when it returns without error. ErrOldKeys names
// the devices that could not be told: a registry rebuilt from one of them would need
// an older master key.
func (p *Proxy) RotateKeys(ctx context.Context) (int, error) {
	if p.opts.Keys == nil {
		return 0, fmt.Errorf("rotate keys: %w", alba.ErrNoKey)
	}
	kvs, err := p.reg.List(ctx, alba.NamespacePrefix)
	if err != nil {
		return 0, err
	}
	rotated := 0
	for _, kv := range kvs {
		n, err := alba.Decode[alba.Namespace](kv.Value)
		if err != nil {
			return rotated, fmt.Errorf("%s: %w", kv.Key, err)
		}
		done, err := p.rotate(ctx, n.Name)
		if err != nil {
			return rotated, opError("rotate the key of", n.Name, "", err)
		}
		if done {
			rotated++
		}
	}
	var errs []error
	for _, m := range p.fleet.Members() {
		if m.Record().State == alba.DeviceRemoved {
			continue // it is never read again
		}
		if err := p.copyRecords(ctx, m); err != nil {
			errs = append(errs, fmt.Errorf("%w: device %s: %w", ErrOldKeys, m.Record().ID, err))
		}
	}
	return rotated, errors.Join(errs...)
}

func (p *Proxy) rotate(ctx context.Context, name string) (bool, error) {
	for range tries {
		n, err := p.loadNamespace(ctx, name)
		if errors.Is(err, ErrNoNamespace) {
			return false, nil
		}
		if err != nil || n.Key == nil {
			return false, err
		}
		key, err := p.opts.Keys.Rewrap(n.ID, n.Key)
		if err != nil || key == n.Key {
			return false, err
		}
		n.Key = key
		n.rev, err = p.reg.Commit(ctx, []alba.Compare{n.compare()}, []alba.Write{n.write()})
		if err == nil {
			return true, nil
		}
		if !errors.Is(err, alba.ErrConflict) {
			return false, err
		}
	}
	return false, ErrBusy
}
