package control

import (
	"context"
	"net/http"
	"net/url"

	"scoria/driver/limit"
)

// SettingsBackend is what can be changed of a volume or pool that exists. Called
// like the other methods of Backend.
type SettingsBackend interface {
	// SetVolume changes what a guest sees of a volume; CodeInUse while one does.
	SetVolume(ctx context.Context, name string, req SetVolume) (Volume, error)
	// RenameVolume gives a volume another name in its pool, which its sockets follow;
	// CodeInUse while somebody uses it, CodeExists.
	RenameVolume(ctx context.Context, name string, req RenameVolume) (Volume, error)

	// Limits and ChangeLimits are a volume's; the change holds at once, also for
	// requests under way.
	Limits(ctx context.Context, name string) (Limits, error)
	ChangeLimits(ctx context.Context, name string, req ChangeLimits) (Limits, error)
	// PoolLimits and ChangePoolLimits are the defaults of a pool's volumes.
	PoolLimits(ctx context.Context, pool string) (Limits, error)
	ChangePoolLimits(ctx context.Context, pool string, req ChangeLimits) (Limits, error)
}

// SetVolume asks for another serial number or access mode. What is nil stays.
type SetVolume struct {
	Serial   *string `json:"serial,omitempty"`    // 1 to 20 printable ASCII characters
	ReadOnly *bool   `json:"read_only,omitempty"` // refuse all writes
}

// RenameVolume asks for another name.
type RenameVolume struct {
	Name string `json:"name"` // VOLUME, or POOL/VOLUME with the pool that it is in
}

// Limits are what a volume or a pool's volumes may do.
type Limits struct {
	Name    string         `json:"name"`              // POOL/VOLUME or POOL
	Own     limit.Settings `json:"own"`               // set on it
	Pool    limit.Settings `json:"pool,omitzero"`     // a volume's: what its pool sets
	InForce limit.Settings `json:"in_force,omitzero"` // a volume's: what holds
	Stats   *LimitStats    `json:"stats,omitempty"`   // an open volume's
}

// LimitStats is what limits did to a volume since the daemon opened it.
type LimitStats struct {
	Limited       bool    `json:"limited"`            // requests wait for a limit, or did a moment ago
	By            string  `json:"by,omitempty"`       // the setting that held up a request last
	Waiting       int     `json:"waiting"`            // requests now
	OldestSeconds float64 `json:"oldest_seconds"`     // how long the one has that waits longest
	ReadsDelayed  uint64  `json:"reads_delayed"`      // requests that had to wait
	WritesDelayed uint64  `json:"writes_delayed"`     //
	ReadWait      float64 `json:"read_wait_seconds"`  // by all of them together
	WriteWait     float64 `json:"write_wait_seconds"` //
}

// ChangeLimits changes limits, in this order: all are cleared, those named in
// Unset are unset, those in Set are set.
type ChangeLimits struct {
	Clear bool           `json:"clear,omitempty"`
	Unset []string       `json:"unset,omitempty"` // names as in limit.Names
	Set   limit.Settings `json:"set"`
}

// Apply returns s with the change made; CodeInvalid if it is not valid.
func (c *ChangeLimits) Apply(s limit.Settings) (limit.Settings, error) {
	if c.Clear {
		s = limit.Settings{}
	}
	for _, name := range c.Unset {
		if err := s.Unset(name); err != nil {
			return s, Errorf(CodeInvalid, "%v", err)
		}
	}
	s = c.Set.Over(s)
	if err := s.Check(); err != nil {
		return s, Errorf(CodeInvalid, "%v", err)
	}
	return s, nil
}

func (s *Server) setVolume(r *http.Request) (int, any, error) {
	var req SetVolume
	if err := decode(r, &req); err != nil {
		return 0, nil, err
	}
	v, err := s.backend.SetVolume(r.Context(), volumeName(r), req)
	return http.StatusOK, v, err
}

func (s *Server) renameVolume(r *http.Request) (int, any, error) {
	var req RenameVolume
	if err := decode(r, &req); err != nil {
		return 0, nil, err
	}
	v, err := s.backend.RenameVolume(r.Context(), volumeName(r), req)
	return http.StatusOK, v, err
}

func (s *Server) volumeLimits(r *http.Request) (int, any, error) {
	l, err := s.backend.Limits(r.Context(), volumeName(r))
	return http.StatusOK, l, err
}

func (s *Server) limitVolume(r *http.Request) (int, any, error) {
	var req ChangeLimits
	if err := decode(r, &req); err != nil {
		return 0, nil, err
	}
	l, err := s.backend.ChangeLimits(r.Context(), volumeName(r), req)
	return http.StatusOK, l, err
}

func (s *Server) poolLimits(r *http.Request) (int, any, error) {
	l, err := s.backend.PoolLimits(r.Context(), r.PathValue("pool"))
	return http.StatusOK, l, err
}

func (s *Server) limitPool(r *http.Request) (int, any, error) {
	var req ChangeLimits
	if err := decode(r, &req); err != nil {
		return 0, nil, err
	}
	l, err := s.backend.ChangePoolLimits(r.Context(), r.PathValue("pool"), req)
	return http.StatusOK, l, err
}

// SetVolume changes a volume's serial number or access mode.
func (c *Client) SetVolume(ctx context.Context, name string, req SetVolume) (v Volume, err error) {
	return v, c.call(ctx, http.MethodPost, volumePath(name)+"/set", req, &v)
}

// RenameVolume gives a volume another name.
func (c *Client) RenameVolume(ctx context.Context, name string, req RenameVolume) (v Volume, err error) {
	return v, c.call(ctx, http.MethodPost, volumePath(name)+"/rename", req, &v)
}

// Limits returns a volume's limits.
func (c *Client) Limits(ctx context.Context, name string) (l Limits, err error) {
	return l, c.call(ctx, http.MethodGet, volumePath(name)+"/limits", nil, &l)
}

// ChangeLimits changes a volume's limits.
func (c *Client) ChangeLimits(ctx context.Context, name string, req ChangeLimits) (l Limits, err error) {
	return l, c.call(ctx, http.MethodPost, volumePath(name)+"/limits", req, &l)
}

// PoolLimits returns the limits that a pool gives to its volumes.
func (c *Client) PoolLimits(ctx context.Context, pool string) (l Limits, err error) {
	return l, c.call(ctx, http.MethodGet, "/v1/pools/"+url.PathEscape(pool)+"/limits", nil, &l)
}

// ChangePoolLimits changes the limits that a pool gives to its volumes.
func (c *Client) ChangePoolLimits(ctx context.Context, pool string, req ChangeLimits) (l Limits, err error) {
	return l, c.call(ctx, http.MethodPost, "/v1/pools/"+url.PathEscape(pool)+"/limits", req, &l)
}
