package trust

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Role is what a user may do.
type Role string

// The roles.
const (
	Operator     Role = "operator"     // everything
	Experimenter Role = "experimenter" // what concerns slices of their own
)

// CheckRole refuses what is none.
func CheckRole(r Role) error {
	if r != Operator && r != Experimenter {
		return fmt.Errorf("%q is no role: there are %s and %s", r, Operator, Experimenter)
	}
	return nil
}

// User is who a certificate is for.
type User struct {
	Name string
	Role Role
}

// UserInfo is what the authority knows of a user.
type UserInfo struct {
	User
	Certificates int       // that are good
	Expires      time.Time // the last of them
}

// ErrStranger is wrapped in the error of a certificate that makes no user known.
var ErrStranger = errors.New("not logged in")

const userScheme = "violin"

func userURI(name string, role Role) *url.URL {
	return &url.URL{Scheme: userScheme, Opaque: "user:" + name + ":" + string(role)}
}

// userOf reads what a certificate says. That it is of the authority was verified.
func userOf(cert *x509.Certificate) (User, error) {
	for _, u := range cert.URIs {
		parts := strings.Split(u.Opaque, ":")
		if u.Scheme != userScheme || len(parts) != 3 || parts[0] != "user" {
			continue
		}
		user := User{Name: parts[1], Role: Role(parts[2])}
		if err := errors.Join(CheckName(user.Name), CheckRole(user.Role)); err != nil {
			return User{}, err
		}
		return user, nil
	}
	return User{}, fmt.Errorf("%w: the certificate is that of host %s, which is no user's", ErrStranger, cert.Subject.CommonName)
}

// User is who a connection of the API is with, now: a certificate may be revoked, or
// expire, while its connection lasts. The error of one that is not good wraps
// [ErrStranger].
func (a *Authority) User(cs tls.ConnectionState) (User, *x509.Certificate, error) {
	if len(cs.VerifiedChains) == 0 {
		return User{}, nil, fmt.Errorf("%w: there is no certificate; `violin login TOKEN@SERVER:PORT` gets one", ErrStranger)
	}
	cert := cs.VerifiedChains[0][0]
	user, err := userOf(cert)
	if err != nil {
		return User{}, nil, err
	}
	if time.Now().After(cert.NotAfter) {
		return User{}, nil, fmt.Errorf("%w: the certificate of user %s expired at %s; log in with a new token", ErrStranger, user.Name, cert.NotAfter.UTC().Format(time.RFC3339))
	}
	a.members.Lock()
	defer a.members.Unlock()
	m, err := a.read(users, user.Name)
	if err != nil {
		return User{}, nil, err
	}
	good := m.Role == user.Role
	if good {
		if good, err = a.used(users, user.Name, m, cert); err != nil {
			return User{}, nil, err
		}
	}
	if !good {
		return User{}, nil, fmt.Errorf("%w: the certificate of user %s was revoked; log in with a new token", ErrStranger, user.Name)
	}
	return user, cert, nil
}

// AdmitUser makes a user's certificate, if the token is good. request is as in
// [Authority.Admit].
func (a *Authority) AdmitUser(token string, request []byte) (User, []byte, error) {
	t, err := ParseToken(token)
	if err != nil {
		return User{}, nil, err
	}
	if t.Role == "" {
		return User{}, nil, fmt.Errorf("%w: it is for a host; `violin agent --join` takes it", ErrToken)
	}
	user := User{t.Name, t.Role}
	a.members.Lock()
	defer a.members.Unlock()
	m, err := a.read(users, t.Name)
	if err != nil {
		return User{}, nil, err
	}
	if err := a.checkToken(t, t.Name, m, time.Now()); err != nil {
		return User{}, nil, err
	}
	if len(m.Certificates) > 0 && m.Role != t.Role {
		return User{}, nil, fmt.Errorf("%w: it makes user %s %s, who is %s; an operator removes the user first (`violin users rm %s`) and then makes another token", ErrToken, t.Name, t.Role, m.Role, t.Name)
	}
	m.Role = t.Role
	der, err := a.issue(users, t.Name, m, "", request)
	return user, der, err
}

// RenewUser makes a user's next certificate. cert is what [Authority.User] returned.
func (a *Authority) RenewUser(cert *x509.Certificate, request []byte) ([]byte, error) {
	return a.renew(users, cert, request)
}

// Revoke makes one certificate of a user worthless, and those that were to replace it.
func (a *Authority) Revoke(cert *x509.Certificate) error {
	name, serial := cert.Subject.CommonName, cert.SerialNumber.Text(16)
	a.members.Lock()
	defer a.members.Unlock()
	m, err := a.read(users, name)
	if err != nil {
		return err
	}
	m.Certificates = slices.DeleteFunc(m.Certificates, func(c issued) bool { return c.Serial == serial || c.Replaces == serial })
	return a.write(users, name, m)
}

// RemoveUser makes a user's certificates, and the tokens that were made before,
// worthless. It tells whether there was such a user.
func (a *Authority) RemoveUser(name string) (bool, error) { return a.remove(users, name) }

// Users are those who have logged in and were not removed since, by name.
func (a *Authority) Users() ([]UserInfo, error) {
	a.members.Lock()
	defer a.members.Unlock()
	found, err := a.list(users)
	if err != nil {
		return nil, err
	}
	var all []UserInfo
	for _, name := range slices.Sorted(maps.Keys(found)) {
		m := found[name]
		i := UserInfo{User: User{name, m.Role}, Certificates: len(m.Certificates)}
		for _, c := range m.Certificates {
			if c.Expires.After(i.Expires) {
				i.Expires = c.Expires
			}
		}
		all = append(all, i)
	}
	return all, nil
}
