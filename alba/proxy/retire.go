package proxy

import (
	"context"
	"errors"
	"fmt"

	"scoria/alba"
)

// A device that is removed is not read any more, so nothing may come to refer to it
// from then on, however long ago its place was chosen:
//
//   - An intent asserts that the devices that it names are in use.
//   - A manifest's commit asserts the records of the devices that it names, and leaves out
//     those that were removed meanwhile: with too few left the object is stored elsewhere.
//   - RemoveUnused first sets the device to draining, so that no intent can come to name it,
//     then looks for intents and for manifests.

// ErrInUse: objects, or uploads or moves under way, refer to the device.
var ErrInUse = errors.New("device is in use")

// SetDeviceState says what the operator wants of a device: ErrDevice if there is none.
func (p *Proxy) SetDeviceState(ctx context.Context, id string, state alba.DeviceState) error {
	_, _, err := p.setDeviceState(ctx, id, state, 0)
	return err
}

// RemoveUnused removes a device that nothing refers to: ErrInUse if something does, by
// what used says, which must look at all intents first and at all manifests after
// that. The device's state then is what it was.
func (p *Proxy) RemoveUnused(ctx context.Context, id string, used func(ctx context.Context) (bool, error)) error {
	was, rev, err := p.deviceState(ctx, id)
	if err != nil || was == alba.DeviceRemoved {
		return err
	}
	if was != alba.DeviceDraining {
		if _, rev, err = p.setDeviceState(ctx, id, alba.DeviceDraining, rev); rev == 0 {
			return err
		}
	}
	inUse := false
	if err == nil {
		inUse, err = used(ctx)
	}
	if err == nil && !inUse {
		_, _, err = p.setDeviceState(ctx, id, alba.DeviceRemoved, rev)
		return err
	}
	if err == nil {
		err = fmt.Errorf("%s: %w", id, ErrInUse)
	}
	if was != alba.DeviceDraining {
		back, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTimeout)
		defer cancel()
		if _, _, berr := p.setDeviceState(back, id, was, rev); berr != nil {
			err = fmt.Errorf("%w; it was not set back from draining: %w", err, berr)
		}
	}
	return err
}

// deviceState returns the state of a device by the registry, and the record's revision.
func (p *Proxy) deviceState(ctx context.Context, id string) (alba.DeviceState, int64, error) {
	kv, ok, err := p.reg.Get(ctx, alba.DeviceKey(id))
	if err != nil {
		return "", 0, err
	}
	if !ok {
		return "", 0, fmt.Errorf("%q: %w", id, ErrDevice)
	}
	d, err := alba.Decode[alba.Device](kv.Value)
	if err != nil {
		err = fmt.Errorf("%s: %w", kv.Key, err)
	}
	return d.State, kv.Revision, err
}

// setDeviceState changes the state of a device, whose record must be of revision rev
// unless that is 0 (ErrBusy), and returns what it was and the record's new revision, that also
// with an error if the state was changed all the same.
func (p *Proxy) setDeviceState(ctx context.Context, id string, state alba.DeviceState, rev int64) (was alba.DeviceState, now int64, err error) {
	for range tries {
		kv, ok, err := p.reg.Get(ctx, alba.DeviceKey(id))
		if err != nil {
			return was, 0, err
		}
		if !ok {
			return was, 0, fmt.Errorf("%q: %w", id, ErrDevice)
		}
		if rev != 0 && kv.Revision != rev {
			return was, 0, fmt.Errorf("%s was changed by somebody else meanwhile: %w", id, ErrBusy)
		}
		d, err := alba.Decode[alba.Device](kv.Value)
		if err != nil {
			return was, 0, fmt.Errorf("%s: %w", kv.Key, err)
		}
		was, d.State = d.State, state
		if err := d.Check(); err != nil {
			return was, 0, err
		}
		now, err := p.reg.Commit(ctx, []alba.Compare{{Key: kv.Key, Revision: kv.Revision}}, []alba.Write{{Key: kv.Key, Value: alba.Encode(d)}})
		if errors.Is(err, alba.ErrConflict) {
			continue
		}
		if err != nil {
			return was, 0, err
		}
		p.saw(now, true)
		err = p.fleet.Reload(ctx)
		if err == nil && state == alba.DeviceRemoved {
			p.copyToAll(ctx)
		}
		return was, now, err
	}
	return was, 0, ErrBusy
}

// assert returns a compare for each device that shards name, with the records that are known here:
// whatever is decided by these is decided anew if one has changed in the registry.
// Devices that refuse holds for are not asserted but returned, as are those that are
// not known.
func (f *Fleet) assert(shards []string, refuse func(state alba.DeviceState) bool) (compares []alba.Compare, refused map[string]bool) {
	refused = map[string]bool{}
	seen := map[string]bool{"": true}
	for _, id := range shards {
		if seen[id] {
			continue
		}
		seen[id] = true
		m := f.Member(id)
		if m == nil {
			refused[id] = true
			continue
		}
		m.mu.Lock()
		state, rev := m.rec.State, m.rev
		m.mu.Unlock()
		if refuse(state) {
			refused[id] = true
			continue
		}
		compares = append(compares, alba.Compare{Key: alba.DeviceKey(id), Revision: rev})
	}
	return compares, refused
}

func removed(state alba.DeviceState) bool { return state == alba.DeviceRemoved }

func notActive(state alba.DeviceState) bool { return state != alba.DeviceActive }

// assertActive returns compares that the devices that shards name are in use. errAgain if
// one is not, or is not known to be any more.
func (f *Fleet) assertActive(shards []string) ([]alba.Compare, error) {
	compares, refused := f.assert(shards, notActive)
	for id := range refused {
		return nil, fmt.Errorf("%w: device %s is taken out of use", errAgain, id)
	}
	return compares, nil
}

// withoutRemoved returns the shards but for those on devices that were removed, and
// compares that the others were not.
func (f *Fleet) withoutRemoved(shards []string) ([]string, []alba.Compare) {
	compares, gone := f.assert(shards, removed)
	kept := make([]string, len(shards))
	for i, id := range shards {
		if !gone[id] {
			kept[i] = id
		}
	}
	return kept, compares
}
